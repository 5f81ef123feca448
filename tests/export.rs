//! Files and directories appear whole or not at all.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use lorafit::export::safetensors::{SafetensorsWriter, TensorInfo, f32_bytes};
use lorafit::export::write::{PartialDir, WriteError, atomic, atomic_bytes, clean_up};
use safetensors::{Dtype, SafeTensors};

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = (fs::read_dir(dir).unwrap())
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn info(name: &str, dtype: Dtype, shape: &[usize]) -> TensorInfo {
    TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    }
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    atomic_bytes(&path, b"old").unwrap();
    let result = atomic(&path, |file| {
        file.write_all(b"ne")?;
        Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
    });
    let text = result.unwrap_err().to_string();
    assert!(
        text.contains("a.json") && text.contains("free some space"),
        "{text}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["a.json"]);
    atomic_bytes(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let text = atomic_bytes(&file.join("x"), b"").unwrap_err().to_string();
    assert!(
        text.contains("file/x") && text.contains("not a directory"),
        "{text}"
    );
    let text = PartialDir::create(&file.join("x")).unwrap_err().to_string();
    assert!(text.contains("file"), "{text}");
    let text = atomic_bytes(&dir.path().join("no/x"), b"")
        .unwrap_err()
        .to_string();
    assert!(text.contains("create its directory first"), "{text}");
    if Path::new("/proc/self").exists() {
        assert!(atomic_bytes(Path::new("/proc/x"), b"").is_err());
    }
    assert!(matches!(
        atomic_bytes(Path::new("/"), b""),
        Err(WriteError::NoName { .. })
    ));
}

#[test]
fn streamed_tensors_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let tensors = vec![
        info("b", Dtype::BF16, &[1]),
        info("z", Dtype::F32, &[2, 1]),
        info("a", Dtype::F32, &[1, 3]),
        info("é", Dtype::F32, &[0]),
    ];
    let mut writer = SafetensorsWriter::create(&path, &[("format", "pt")], tensors).unwrap();
    let order: Vec<String> = writer.order().iter().map(|t| t.name.clone()).collect();
    assert_eq!(order, ["a", "z", "é", "b"]);
    writer.write("a", &f32_bytes(&[1.0, 2.0, 3.0])).unwrap();
    writer.write("z", &f32_bytes(&[4.0, 5.0])).unwrap();
    let text = writer.write("b", &[0, 0]).unwrap_err().to_string();
    assert!(
        text.contains("tensor b") && text.contains("expected é"),
        "{text}"
    );
    writer.write("é", &[]).unwrap();
    let text = writer.write("b", &[0]).unwrap_err().to_string();
    assert!(text.contains("expected BF16 [1], found 1 bytes"), "{text}");
    writer.write("b", &[0x80, 0x3f]).unwrap();
    assert!(!path.exists());
    let size = writer.finish().unwrap();

    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, size);
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header % 8, 0);
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(
        read.tensor("z").unwrap().data(),
        f32_bytes(&[4.0, 5.0]).as_ref()
    );
    assert_eq!(read.tensor("b").unwrap().shape(), [1]);
}

#[test]
fn an_unfinished_file_never_appears() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let create = |tensors| SafetensorsWriter::create(&path, &[], tensors);
    let text = create(vec![info("a", Dtype::F32, &[1])])
        .unwrap()
        .finish()
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("tensor a") && text.contains("found 0"),
        "{text}"
    );
    let twice = vec![info("a", Dtype::F32, &[1]), info("a", Dtype::F32, &[2])];
    assert!(create(twice).unwrap_err().to_string().contains("found two"));
    let huge = vec![info("a", Dtype::F32, &[usize::MAX, 2])];
    assert!(
        create(huge)
            .unwrap_err()
            .to_string()
            .contains("a size that fits")
    );
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn a_directory_appears_whole() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("deep/state");
    let partial = PartialDir::create(&target).unwrap();
    fs::create_dir(partial.path().join("sub")).unwrap();
    atomic_bytes(&partial.path().join("sub/a"), b"1").unwrap();
    assert!(!target.exists());
    partial.publish().unwrap();
    assert_eq!(names(target.parent().unwrap()), ["state"]);

    let second = PartialDir::create(&target).unwrap();
    assert!(matches!(second.publish(), Err(WriteError::Exists { .. })));
    let third = PartialDir::create(&target).unwrap();
    fs::write(third.path().join("b"), "2").unwrap();
    third.publish_replacing().unwrap();
    assert_eq!(names(&target), ["b"]);
    drop(PartialDir::create(&target).unwrap());
    assert_eq!(names(target.parent().unwrap()), ["state"]);
}

#[test]
fn what_a_killed_process_left_is_cleaned_up_and_the_living_spared() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let living = PartialDir::create(&at("state")).unwrap();
    fs::create_dir_all(at(".state.partial-1-0/sub")).unwrap();
    fs::write(at(".a.json.partial-99-12"), "").unwrap();
    fs::create_dir(at(".old.replaced-7-0")).unwrap();
    fs::write(at(".old.replaced-7-0/x"), "").unwrap();
    fs::write(at(".gone.replaced-7-0"), "").unwrap();
    fs::write(at("gone"), "").unwrap();
    for kept in [".partial-1-0.txt", ".state.partial-x-0", "x.partial-1-0"] {
        fs::write(at(kept), "").unwrap();
    }
    let touched = clean_up(dir.path()).unwrap();
    assert_eq!(touched.len(), 4, "{touched:?}");
    let living_name = living.path().file_name().and_then(OsStr::to_str).unwrap();
    let mut expected = [
        ".partial-1-0.txt",
        ".state.partial-x-0",
        "x.partial-1-0",
        "gone",
        "old",
        living_name,
    ];
    expected.sort();
    assert_eq!(names(dir.path()), expected);
    assert_eq!(clean_up(&at("missing")).unwrap().len(), 0);

    fs::create_dir(at(".other.partial-1-0")).unwrap();
    fs::create_dir(at(".merged.partial-1-0")).unwrap();
    PartialDir::create(&at("merged"))
        .unwrap()
        .publish()
        .unwrap();
    let there = names(dir.path());
    assert!(
        there.contains(&".other.partial-1-0".to_owned()),
        "{there:?}"
    );
    assert!(
        !there.contains(&".merged.partial-1-0".to_owned()),
        "{there:?}"
    );
}

/// Runs the ignored test `name` of this binary in a process of its own.
fn child(name: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--ignored", "--quiet"])
        .env("LORAFIT_TEST_DIR", dir);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn child_dir() -> Option<std::path::PathBuf> {
    std::env::var_os("LORAFIT_TEST_DIR").map(Into::into)
}

#[test]
#[ignore = "run by a_kill_at_any_moment_leaves_one_whole_state"]
fn replace_for_ever() {
    let Some(dir) = child_dir() else { return };
    for n in 0.. {
        let partial = PartialDir::create(&dir.join("state")).unwrap();
        for file in ["a", "b"] {
            atomic_bytes(
                &partial.path().join(file),
                format!("{n}").repeat(5000).as_bytes(),
            )
            .unwrap();
        }
        partial.publish_replacing().unwrap();
    }
}

#[test]
fn a_kill_at_any_moment_leaves_one_whole_state() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut seen = 0;
    for round in 0..25_u64 {
        let mut process = child("export::replace_for_ever", dir.path())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(40_000 + round * 1_731));
        process.kill().unwrap();
        process.wait().unwrap();
        clean_up(dir.path()).unwrap();
        let there = names(dir.path());
        assert!(there.is_empty() || there == ["state"], "{there:?}");
        if there.is_empty() {
            assert_eq!(seen, 0, "the old state was lost");
            continue;
        }
        seen += 1;
        assert_eq!(names(&state), ["a", "b"]);
        let read = |name| fs::read(state.join(name)).unwrap();
        assert_eq!(read("a"), read("b"));
        assert_eq!(read("a").len() % 5000, 0);
    }
    assert!(seen > 0, "no state was ever published");
}

#[test]
#[ignore = "run by a_full_disk_leaves_the_old_file"]
fn write_too_much() {
    let Some(dir) = child_dir() else { return };
    let result = atomic_bytes(&dir.join("a"), &vec![1; 1 << 20]);
    fs::write(dir.join("err"), result.unwrap_err().to_string()).unwrap();
}

/// A limit on the size of files stands in for a full disk, which needs a file system of its own.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "old").unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""]);
    let inner = child("export::write_too_much", dir.path());
    shell
        .arg(inner.get_program())
        .args(inner.get_args())
        .env("LORAFIT_TEST_DIR", dir.path());
    shell.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(shell.status().unwrap().success());
    let text = fs::read_to_string(dir.path().join("err")).unwrap();
    assert!(text.contains("ulimit"), "{text}");
    assert_eq!(names(dir.path()), ["a", "err"]);
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"old");
}

/// The real thing, where a file system of 64 KiB may be mounted (root on Linux).
#[cfg(target_os = "linux")]
#[test]
fn a_really_full_disk_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        let status = Command::new("mount")
            .args(args)
            .arg(dir.path())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=64k", "tmpfs"]) {
        println!("skipped: this user may not mount a tmpfs");
        return;
    }
    let path = dir.path().join("a");
    atomic_bytes(&path, b"old").unwrap();
    let result = atomic_bytes(&path, &vec![1; 1 << 20]);
    let left = (names(dir.path()), fs::read(&path).unwrap());
    assert!(
        Command::new("umount")
            .arg(dir.path())
            .status()
            .unwrap()
            .success()
    );
    let text = result.unwrap_err().to_string();
    assert!(text.contains("free some space"), "{text}");
    assert_eq!(left, (vec!["a".to_owned()], b"old".to_vec()));
}
