//! `causeway test` as a user sees it. What needs /dev/kvm says so where there is none.

use std::io::Write;
use std::process::{Command, Output};

use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

mod rig;

use rig::{has_kvm, image};

fn run(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_causeway")).arg("test").args(args).output();
    let Output { status, stdout, stderr } = output.unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (status.code().unwrap_or(-1), text(&stdout), text(&stderr))
}

#[test]
fn the_suite_lists_its_tests_without_running_any() {
    let (code, out, _) = run(&["--list"]);
    assert_eq!(code, 0);
    assert!(out.lines().any(|line| line == "a1_translation_off_is_identity"), "{out}");
    let (code, filtered, _) = run(&["--list", "--filter", "^a1_translation_off_is_identity$"]);
    assert_eq!((code, filtered.as_str()), (0, "a1_translation_off_is_identity\n"));
}

#[test]
fn wrong_usage_is_code_2_and_a_missing_image_is_code_4() {
    for args in [&["--filter", "("][..], &["--filter", "no_such_test"], &["--device", "warp"], &["--jobs", "0"]] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        assert!(!err.is_empty());
    }
    let (code, _, err) = run(&["/nonexistent/image"]);
    assert_eq!(code, 4);
    assert!(err.contains("/nonexistent/image"), "{err}");
}

#[test]
fn a_test_that_passes_is_code_0_and_stands_in_the_results() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let junit = dir.as_path().join("results.xml");
    let (code, out, err) = run(&["--filter", "^a1_translation_off_is_identity$", "--junit", junit.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("test a1_translation_off_is_identity ... ok"), "{out}");
    assert_eq!(out.lines().last(), Some("1 passed, 0 failed, 0 skipped"));
    let results = std::fs::read_to_string(junit).unwrap();
    assert!(results.contains("tests=\"1\" failures=\"0\""), "{results}");
}

#[test]
fn a_test_has_the_memory_that_it_asks_for() {
    if !has_kvm() {
        return;
    }
    let (code, out, err) = run(&["--filter", "^machine_memory_", "--device", "edu"]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(out.lines().last(), Some("2 passed, 0 failed, 0 skipped"), "{out}");
}

#[test]
fn bad_images_have_a_verdict_each() {
    if !has_kvm() {
        return;
    }
    let text = TempFile::new().unwrap();
    text.as_file().write_all(b"no image").unwrap();
    let cases: [(TempFile, &str); 4] = [
        (text, "the start was refused"),
        (image(&[0xeb, 0xfe]), "it hung"),
        (image(&[0x0f, 0x0b]), "it crashed"),
        (image(&[0xb0, 0x01, 0xe6, 0xf4, 0xeb, 0xfe]), "FAILED"),
    ];
    for (image, part) in cases {
        let (code, out, err) = run(&[image.as_path().to_str().unwrap(), "--timeout", "0.5"]);
        assert_eq!(code, 8, "{out}{err}");
        assert!(out.contains(part), "{out}, not: {part}");
        assert_eq!(out.lines().last(), Some("0 passed, 1 failed, 0 skipped"));
    }
    let good = image(&[0xb0, 0x00, 0xe6, 0xf4, 0xeb, 0xfe]);
    assert_eq!(run(&[good.as_path().to_str().unwrap()]).0, 0);
}
