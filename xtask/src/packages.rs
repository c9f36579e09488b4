//! What an embedder gets of `vtd` and `vfio-bridge`: their packages hold what builds, its examples and tests, and what
//! explains it, and nothing else.

use crate::cache::workspace;
use crate::crate_tests::cargo;
use crate::rust_files::rust_files;
use regex::Regex;
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

const PACKAGES: [&str; 2] = ["vtd", "vfio-bridge"];
/// What cargo writes itself.
const OF_CARGO: [&str; 3] = [".cargo_vcs_info.json", "Cargo.lock", "Cargo.toml.orig"];
const DOCUMENTS: [&str; 4] = ["Cargo.toml", "LICENSE-APACHE", "LICENSE-BSD-3-Clause", "README.md"];
/// Tests and benchmarks share a file with the unit tests in `src`, and embedders may want to run them.
const FOLDERS: [&str; 4] = ["benches", "examples", "src", "tests"];

/// What tests read that is no code.
const DATA: [&str; 2] = ["tests/hostile/corpus/state.txt", "tests/hostile/corpus/unit.txt"];

/// The names in the package, as cargo would make it.
fn packaged(package: &str) -> BTreeSet<String> {
    let result = cargo().args(["package", "--list", "--allow-dirty", "--offline", "-p", package]).output().unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    String::from_utf8(result.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// What should be there.
fn wanted(folder: &Path) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = OF_CARGO.iter().chain(&DOCUMENTS).map(|name| (*name).to_owned()).collect();
    for (path, _) in FOLDERS.iter().flat_map(|of| rust_files(&folder.join(of))) {
        names.insert(path.strip_prefix(folder).unwrap().to_string_lossy().into_owned());
    }
    names.extend(DATA.iter().filter(|name| folder.join(name).is_file()).map(|name| (*name).to_owned()));
    names
}

/// The path without its `..`, which must not lead out of where it begins.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => assert!(plain.pop(), "{}", path.display()),
            part => plain.push(part),
        }
    }
    plain
}

#[test]
fn packages_have_what_builds_and_explains_them_and_nothing_else() {
    for package in PACKAGES {
        let (packaged, wanted) = (packaged(package), wanted(&workspace().join(package)));
        for folder in FOLDERS {
            assert!(wanted.iter().any(|name| name.starts_with(folder)), "{package} has no {folder}");
        }
        let missing: Vec<_> = wanted.difference(&packaged).collect();
        let useless: Vec<_> = packaged.difference(&wanted).collect();
        assert!(missing.is_empty() && useless.is_empty(), "{package} lacks {missing:?} and has {useless:?}");
    }
}

#[test]
fn no_file_of_a_package_reads_one_that_is_not_in_it() {
    let read = Regex::new(r#"(?:#\[path = |include_(?:str|bytes)!\()"([^"]+)""#).unwrap();
    let mut seen = 0;
    for package in PACKAGES {
        let folder = workspace().join(package);
        for (path, text) in rust_files(&folder) {
            for found in read.captures_iter(&text) {
                let other = plain(&path.parent().unwrap().join(&found[1]));
                assert!(other.starts_with(&folder), "{} reads {}", path.display(), other.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 10, "only {seen} were found");
}

#[test]
fn the_readmes_bind_a_function_in_the_same_way() {
    // The tests of vfio-bridge hold its own to what its messages say.
    let text = |file: &str| std::fs::read_to_string(workspace().join(file)).unwrap();
    let own = text("vfio-bridge/README.md");
    let begin = own.find("```sh\nmodprobe ").expect("its commands");
    let commands = own[begin..].split_inclusive("```\n").next().unwrap();
    assert!(text("README.md").contains(commands), "README.md lacks {commands}");
}
