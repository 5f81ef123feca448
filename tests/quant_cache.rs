//! `base.cache_limit`: quantised bases are kept between runs, checked when they are found, and done
//! without where they cannot be.

use std::fs;
use std::path::PathBuf;

use crate::fixture::{Ran, Workspace};
use crate::verify::edit;

fn train(workspace: &Workspace, out: &str, sets: &[&str]) -> Ran {
    let out = format!("output_dir={out}");
    let mut args = vec!["train", "recipe.yaml", "--json", "--set", &out];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    workspace.run(&args).exits(0)
}

/// What a run learned, to the byte.
fn adapter(workspace: &Workspace, out: &str) -> Vec<u8> {
    fs::read(
        workspace
            .path(out)
            .join("adapter/adapter_model.safetensors"),
    )
    .unwrap()
}

fn stores(workspace: &Workspace) -> Vec<PathBuf> {
    let names = workspace.names("cache").into_iter();
    let paths = names.map(|name| workspace.path("cache").join(name));
    let is_store = |path: &PathBuf| path.extension().is_some_and(|e| e == "quantized");
    paths.filter(is_store).collect()
}

#[test]
fn a_kept_base_trains_as_the_one_just_quantised() {
    for scheme in ["nf4", "nf4-double", "int8"] {
        let workspace = Workspace::new();
        let set = format!("base.quantization={scheme}");
        train(&workspace, "fresh", &[&set]);
        let [store] = &stores(&workspace)[..] else {
            panic!("{:?}", workspace.names("cache"))
        };
        let written = fs::metadata(store).unwrap();
        train(&workspace, "kept", &[&set]);
        assert!(
            adapter(&workspace, "fresh") == adapter(&workspace, "kept"),
            "{scheme}"
        );
        // It was read, not written again: the same file.
        let read = fs::metadata(store).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            assert_eq!(written.ino(), read.ino());
        }
        assert_eq!(written.len(), read.len());
        assert_eq!(stores(&workspace).len(), 1);
    }
}

#[test]
fn what_is_kept_is_of_one_base_one_scheme_and_the_same_matrices() {
    let workspace = Workspace::new();
    train(&workspace, "one", &["base.quantization=nf4"]);
    train(&workspace, "two", &["base.quantization=int8"]);
    let whole = "adapter.modules_to_save=[k_proj]";
    let targets = "adapter.target_modules=[q_proj]";
    train(
        &workspace,
        "three",
        &["base.quantization=nf4", whole, targets],
    );
    assert_eq!(stores(&workspace).len(), 3);
    let path = workspace.path("base/model.safetensors");
    edit(&path, "layers.1.mlp.up_proj.weight", |x| 2.0 * x);
    train(&workspace, "four", &["base.quantization=nf4"]);
    assert_eq!(stores(&workspace).len(), 4);
    assert!(adapter(&workspace, "one") != adapter(&workspace, "four"));
}

#[test]
fn a_damaged_store_is_made_anew() {
    let workspace = Workspace::new();
    let set = ["base.quantization=nf4-double"];
    train(&workspace, "first", &set);
    let first = adapter(&workspace, "first");
    let path = stores(&workspace).remove(0);
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    let mut other_version = whole.clone();
    other_version[8] += 1;
    for (i, damaged) in [&whole[..whole.len() / 2], &[], &flipped, &other_version]
        .into_iter()
        .enumerate()
    {
        // Not in place: somebody may have it mapped.
        fs::remove_file(&path).unwrap();
        fs::write(&path, damaged).unwrap();
        let out = format!("again-{i}");
        train(&workspace, &out, &set);
        assert!(adapter(&workspace, &out) == first, "{i}");
        assert!(fs::read(&path).unwrap() == whole, "{i}: it is whole again");
    }
}

#[test]
fn a_cache_that_is_off_or_cannot_be_written_is_done_without() {
    let workspace = Workspace::new();
    let nf4 = "base.quantization=nf4";
    train(&workspace, "off", &[nf4, "base.cache_limit=0"]);
    assert!(stores(&workspace).is_empty());
    workspace.write("file", "");
    let ran = train(&workspace, "nowhere", &[nf4, "base.cache_dir=file/below"]);
    let warning = ran.event("warning");
    assert_eq!(warning["kind"], "quantised_not_kept");
    let message = warning["message"].as_str().unwrap();
    assert!(
        message.contains("file/below") && message.contains("base.cache_dir"),
        "{message}"
    );
    assert!(adapter(&workspace, "off") == adapter(&workspace, "nowhere"));
    // One that alone passes the limit is not kept.
    train(&workspace, "small", &[nf4, "base.cache_limit=0.00001"]);
    assert!(stores(&workspace).is_empty());
}

/// The shell's limit on file sizes stands in for a full disk.
#[test]
fn a_disk_without_room_for_a_store_costs_a_warning() {
    let workspace = Workspace::new();
    let bin = env!("CARGO_BIN_EXE_lorafit");
    // 60 blocks of 512 or 1024 bytes are less than the matrices in 8 bits, and more than all else.
    let script = format!(
        "trap '' XFSZ; ulimit -f 60; exec '{bin}' train recipe.yaml --json \
         --set base.quantization=int8 --set train.max_steps=1 --set data.cache_limit=0 \
         --set adapter.rank=1 --set 'adapter.target_modules=[q_proj]'"
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(workspace.path(""))
        .env("LORAFIT_CACHE", workspace.path("cache"))
        .stdin(std::process::Stdio::null())
        .output()
        .expect("a shell");
    let ran = Ran::from(&["train"], output).exits(0);
    let warning = ran.event("warning");
    assert_eq!(warning["kind"], "quantised_not_kept", "{warning}");
    assert!(workspace.names("cache").is_empty(), "nothing is left");
}
