//! A run that is stopped, killed or out of disk at any moment, and continued, ends with the same
//! bytes as one that was never stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lorafit::random::Stream;
use serde_json::Value;

use crate::fixture::{Ran, Workspace, chat};
use crate::optimizer::overflowing;

/// Everything that a state must carry is in use: dropout, shuffling over several epochs, Adam's
/// moments, a schedule, the best evaluation, samples drawn at random.
const RECIPE: &str = "\
base: {model: base}
data: {train: [data.jsonl], validation_fraction: 0.2, max_seq_len: 96}
adapter: {rank: 8, dropout: 0.1}
train:
  micro_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 5.0e-3
  weight_decay: 0.01
  max_steps: 14
  eval_steps: 4
  save_steps: 2
sample: {prompts: [Define Bore.], max_new_tokens: 6, temperature: 0.9}
output_dir: straight
";

/// Rows of two sources, one of them seen one and a half times, read in blocks that are no multiple of
/// a step, and packed.
const STREAMED: &str = "data:
  train: [data.jsonl, {path: more.jsonl, weight: 1.5}]
  validation: [held-out.jsonl]
  streaming: true
  shuffle_buffer: 7
  packing: true
  max_seq_len: 96";

/// A workspace with rows of uneven length, four steps an epoch.
fn workspace(kind: &str) -> Workspace {
    let workspace = Workspace::new();
    let rows: String = (0..40)
        .map(|i| {
            let answer = "A person who talks when you wish. ".repeat(1 + i % 4);
            chat(&format!("Define number {i}."), answer.trim_end())
        })
        .collect();
    workspace.write("data.jsonl", &rows);
    let adapter = "adapter: {rank: 8, dropout: 0.1}";
    let data = "data: {train: [data.jsonl], validation_fraction: 0.2, max_seq_len: 96}";
    let recipe = match kind {
        "bf16" => RECIPE.replace("train:\n", "train:\n  precision: bf16\n"),
        "quantised" => {
            let quantised = "base: {model: base, quantization: nf4-double}";
            RECIPE.replace("base: {model: base}", quantised)
        }
        "eight_bit" => {
            // Tensors of 4096 numbers and more are quantised: 64 columns in rank 64.
            let recipe = RECIPE.replace("train:\n", "train:\n  optimizer: adamw_8bit\n");
            recipe.replace("rank: 8", "rank: 64")
        }
        "overflowing" => {
            overflowing(&workspace.path("base/model.safetensors"));
            let recipe = RECIPE.replace("train:\n", "train:\n  precision: f16\n");
            recipe.replace("rank: 8", "rank: 8, modules_to_save: [lm_head]")
        }
        "full" => RECIPE.replace(adapter, "adapter: {method: full}"),
        "streamed" => {
            workspace.write(
                "more.jsonl",
                &rows[..1 + rows[..rows.len() / 3].rfind('\n').unwrap()],
            );
            workspace.write("held-out.jsonl", &chat("Define Cat.", "A soft thing."));
            RECIPE.replace(data, STREAMED)
        }
        _ => RECIPE.to_string(),
    };
    workspace.write("recipe.yaml", &recipe);
    workspace
}

/// Starts the run in `out`, from the beginning or where it stands.
fn start(workspace: &Workspace, out: &str) -> Child {
    let args = ["train", "recipe.yaml", "--out", out, "--resume", "--quiet"];
    workspace.command(&args).spawn().expect("lorafit starts")
}

fn finish(workspace: &Workspace, out: &str) {
    let args = ["train", "recipe.yaml", "--out", out, "--resume", "--quiet"];
    workspace.run(&args).exits(0);
}

/// The way every shell sends it; the standard library only kills.
fn interrupt(child: &Child) {
    let line = format!("kill -INT {}", child.id());
    let sent = Command::new("sh").args(["-c", &line]).status();
    assert!(sent.expect("a shell").success());
}

/// Waits until `done` or the process ended; whether it was `done` first.
fn until(child: &mut Child, mut done: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    loop {
        if done() {
            return true;
        }
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing happens");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn ended(child: Child) -> Ran {
    Ran::from(&["train"], child.wait_with_output().expect("a child"))
}

/// All files below a directory by relative path, without what may differ between two runs.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path
                    .strip_prefix(dir)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

/// The numbers of a run: its steps, evaluations and samples, without timings.
fn numbers(workspace: &Workspace, out: &str) -> Vec<Value> {
    let text = workspace.read(&format!("{out}/metrics.jsonl"));
    let events = text
        .lines()
        .map(|line| serde_json::from_str(line).expect(line));
    let mut numbers = Vec::new();
    for mut event in events {
        let event: &mut Value = &mut event;
        let kind = event["event"].as_str().expect("an event").to_string();
        if ["step", "overflow", "eval", "sample", "early_stop"].contains(&kind.as_str()) {
            let fields = event.as_object_mut().expect("an object");
            for timing in [
                "seconds",
                "tokens_per_second",
                "memory_bytes",
                "memory_peak_bytes",
            ] {
                fields.remove(timing);
            }
            numbers.push(event.clone());
        }
    }
    numbers
}

/// Asserts that two runs left the same, byte for byte, and nothing half-written.
#[track_caller]
fn assert_same(workspace: &Workspace, straight: &str, other: &str) {
    let (want, got) = (
        files(&workspace.path(straight)),
        files(&workspace.path(other)),
    );
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&want), names(&got));
    for (name, want) in &want {
        // The recipe and the card that quotes it name the run directory; metrics hold timings.
        let differs = ["recipe.yaml", "metrics.jsonl", "README.md", "run.lock"];
        if !differs.iter().any(|file| name.ends_with(file)) {
            assert!(
                *want == got[name],
                "{other}/{name} differs from an uninterrupted run's"
            );
        }
    }
    assert_eq!(numbers(workspace, straight), numbers(workspace, other));
}

/// The run that nothing stops.
fn straight(workspace: &Workspace) {
    finish(workspace, "straight");
    let numbers = numbers(workspace, "straight");
    let count = |kind: &str| {
        numbers
            .iter()
            .filter(|event| event["event"] == kind)
            .count()
    };
    let steps = count("step") + count("overflow");
    assert_eq!((steps, count("eval"), count("sample")), (14, 5, 5));
}

/// Whether a step is in the metrics of a run.
fn recorded(run: &Path, step: usize) -> bool {
    let mark = format!("{{\"event\":\"step\",\"step\":{step},");
    let text = fs::read(run.join("metrics.jsonl")).unwrap_or_default();
    String::from_utf8_lossy(&text).contains(&mark)
}

/// The step of the last complete state, 0 without any.
fn last_state(states: &Path) -> usize {
    let names = fs::read_dir(states).into_iter().flatten().flatten();
    let steps = names.filter_map(|entry| {
        entry
            .file_name()
            .to_str()?
            .strip_prefix("step-")?
            .parse()
            .ok()
    });
    steps.max().unwrap_or(0)
}

/// Interrupts after the steps given, continues each time, and compares.
fn interrupted_at(kind: &str, steps: &[usize]) {
    let workspace = workspace(kind);
    straight(&workspace);
    for &step in steps {
        let mut child = start(&workspace, "stopped");
        let run = workspace.path("stopped");
        let reached = until(&mut child, || recorded(&run, step));
        assert!(reached, "step {step} was never reached");
        interrupt(&child);
        ended(child).exits(130);
        let states = workspace.names("stopped/states");
        assert!(
            states
                .iter()
                .any(|state| *state >= format!("step-{step:06}")),
            "{states:?}"
        );
    }
    finish(&workspace, "stopped");
    assert_same(&workspace, "straight", "stopped");
}

#[test]
fn an_interrupted_run_goes_on_exactly() {
    interrupted_at("lora", &[1, 5, 9]);
}

#[test]
fn an_interrupted_run_in_bf16_goes_on_exactly() {
    interrupted_at("bf16", &[4]);
}

#[test]
fn an_interrupted_run_on_a_quantised_base_goes_on_exactly() {
    interrupted_at("quantised", &[3, 8]);
}

#[test]
fn an_interrupted_run_with_moments_in_8_bits_goes_on_exactly() {
    interrupted_at("eight_bit", &[3, 8]);
}

#[test]
fn an_interrupted_run_that_skipped_steps_goes_on_exactly() {
    interrupted_at("overflowing", &[8, 10]);
}

#[test]
fn an_interrupted_run_of_all_weights_goes_on_exactly() {
    interrupted_at("full", &[3, 8]);
}

/// Whether something half-written, whose name will begin with `name`, is in a directory.
fn half_written(dir: &Path, name: &str) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| {
        let file_name = entry.file_name();
        let file_name = file_name.to_string_lossy();
        file_name.starts_with(&format!(".{name}")) && file_name.contains(".partial-")
    })
}

/// Kills at random moments, and in the middle of writing states and results.
fn killed(kind: &str, seed: u64) {
    let workspace = workspace(kind);
    straight(&workspace);
    let random = Stream::new(seed);
    let (run, states) = (workspace.path("killed"), workspace.path("killed/states"));
    let (mut in_a_state, mut in_a_result, mut at_random) = (0, 0, 0);
    while in_a_result < 2 {
        let attempt = in_a_state + at_random;
        let mut child = start(&workspace, "killed");
        let count = if last_state(&states) >= 12 {
            let result = || half_written(&run, "adapter.") || half_written(&run, "model.");
            until(&mut child, result).then_some(&mut in_a_result)
        } else if attempt % 2 == 0 {
            until(&mut child, || half_written(&states, "step-")).then_some(&mut in_a_state)
        } else {
            // One or two states further, then at a moment within a step or a write.
            let next = last_state(&states) + 2 + 2 * (random.bits(attempt) % 2) as usize;
            let reached = until(&mut child, || last_state(&states) >= next.min(14));
            let moment = random.uniform(attempt) * 20e-3;
            std::thread::sleep(Duration::from_secs_f64(moment));
            reached.then_some(&mut at_random)
        };
        let Some(count) = count else {
            break; // it was done first
        };
        *count += 1;
        child.kill().expect("a child");
        child.wait().expect("a child");
        assert!(attempt < 60, "it makes no progress");
    }
    let counts =
        format!("{in_a_state} in a state, {in_a_result} in a result, {at_random} at random");
    eprintln!("killed {counts}");
    finish(&workspace, "killed");
    assert!(
        in_a_state > 1 && at_random > 1 && in_a_result > 0,
        "{counts}"
    );
    assert_same(&workspace, "straight", "killed");
}

#[test]
fn a_killed_run_goes_on_exactly() {
    killed("lora", 7);
}

#[test]
fn a_killed_streamed_run_goes_on_exactly() {
    killed("streamed", 3);
}

#[test]
fn a_killed_run_of_all_weights_goes_on_exactly() {
    killed("full", 8);
}

/// A line that a kill or a full disk cut short, even within a character, is no obstacle.
#[test]
fn a_damaged_end_of_the_metrics_is_dropped() {
    let workspace = workspace("lora");
    straight(&workspace);
    let mut child = start(&workspace, "cut");
    until(&mut child, || {
        workspace.path("cut/states/step-000004").exists()
    });
    child.kill().expect("a child");
    child.wait().expect("a child");
    let path = workspace.path("cut/metrics.jsonl");
    let mut metrics = fs::read(&path).unwrap();
    metrics.extend_from_slice(b"{\"event\":\"sample\",\"step\":4,\"text\":\"\xc3");
    fs::write(path, metrics).unwrap();
    finish(&workspace, "cut");
    assert_same(&workspace, "straight", "cut");
}

/// The shell's limit on file sizes stands in for a disk that has no room for a state.
#[test]
fn a_state_that_cannot_be_written_costs_nothing_before_it() {
    let workspace = workspace("lora");
    straight(&workspace);
    let mut child = start(&workspace, "limited");
    until(&mut child, || {
        workspace.path("limited/states/step-000004").exists()
    });
    interrupt(&child);
    ended(child).exits(130);
    let before = files(&workspace.path("limited/states"));
    let bin = env!("CARGO_BIN_EXE_lorafit");
    // 150 blocks of 512 or 1024 bytes are less than the moments of rank 8. Ignored, the signal
    // becomes an error of the write, as on a full disk.
    let script = format!(
        "trap '' XFSZ; ulimit -f 150; exec '{bin}' train recipe.yaml --out limited --resume --quiet"
    );
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(workspace.path(""))
        .env("LORAFIT_CACHE", workspace.path("cache"))
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    let parts = [
        "limited/states/",
        ".safetensors",
        "File too large",
        "`ulimit -f` forbids",
    ];
    Ran::from(&["train"], output).fails(1, &parts);
    assert!(
        before == files(&workspace.path("limited/states")),
        "earlier states changed"
    );
    finish(&workspace, "limited");
    assert_same(&workspace, "straight", "limited");
}

/// A real full disk: a file system of 900 KiB in a mount namespace of its own, three states wide.
#[test]
fn a_full_disk_costs_nothing_before_it() {
    let workspace = workspace("lora");
    straight(&workspace);
    fs::create_dir(workspace.path("disk")).unwrap();
    let bin = env!("CARGO_BIN_EXE_lorafit");
    let script = format!(
        "mount -t tmpfs -o size=900k none disk || exit 77
        train() {{ '{bin}' train recipe.yaml --out disk/run --resume --quiet; }}
        train; echo \"exit $?\"; ls -A disk/run/states; cp -r disk/run early
        mount -o remount,size=9m disk && train; echo \"exit $?\"; cp -r disk/run roomy"
    );
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script])
        .current_dir(workspace.path(""))
        .env("LORAFIT_CACHE", workspace.path("cache"))
        .stdin(Stdio::null())
        .output();
    let ran = match output {
        Ok(output) if output.status.success() => Ran::from(&["train"], output),
        other => {
            let reason = other.map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
            eprintln!("skipped: no file system can be mounted here: {reason:?}");
            return;
        }
    };
    assert_eq!(
        ran.out, "exit 1\nstep-000002\nstep-000004\nexit 0\n",
        "{}",
        ran.err
    );
    for part in [
        "disk/run/states/",
        "No space left on device",
        "; free some space",
    ] {
        assert!(ran.err.contains(part), "no `{part}` in {}", ran.err);
    }
    assert_same(&workspace, "straight", "roomy");
}
