//! The structure of the tree: no circle among the modules of a crate, no file that is too long, no comment that is too
//! wide.

use crate::cache::workspace;
use crate::rust_files::rust_files;
use regex::Regex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Where modules are.
const CRATES: [&str; 5] = ["vtd/src", "vfio-bridge/src", "devices/src", "vmm/src", "xtask/src"];
/// All Rust there is.
const FOLDERS: [&str; 6] = ["vtd", "vfio-bridge", "devices", "vmm", "xtask", "tests"];
const MOST_LINES: usize = 600;
const MOST_COLUMNS: usize = 120;

/// The module of a file: `a::b` of `a/b.rs` and of `a/b/mod.rs`, and the empty name of the crate's root.
fn module_of(file: &Path) -> String {
    let name = file.with_extension("").to_string_lossy().replace('/', "::");
    match name.as_str() {
        "lib" | "main" | "mod" => String::new(),
        name => name.strip_suffix("::mod").unwrap_or(name).to_owned(),
    }
}

/// What is compiled for tests alone: a file of its own, or the end of one.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

fn is_test(module: &str) -> bool {
    let name = module.rsplit("::").next().unwrap_or(module);
    name.ends_with("_test") || name == "tests" || name == "test_bench" || name == "rig"
}

/// The paths in a `use` or an expression that begin in this crate: what stands behind `crate::` and `super::`, groups
/// taken apart.
fn paths(module: &str, text: &str) -> Vec<String> {
    let begin = Regex::new(r"\b(crate|super|self)::((?:\w+::)*)(\w+|\{)").unwrap();
    let comment = Regex::new(r"//[^\n]*").unwrap();
    let text = comment.replace_all(text, "");
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let mut found = Vec::new();
    for path in begin.captures_iter(&text) {
        let base = match &path[1] {
            "crate" => "",
            "super" => parent,
            _ => module,
        };
        let joined = |rest: &str| [base, rest].join("::").trim_matches(':').to_owned();
        if &path[3] != "{" {
            found.push(joined(&format!("{}{}", &path[2], &path[3])));
            continue;
        }
        let group = text[path.get(0).unwrap().end()..].split(';').next().unwrap_or("");
        for item in group.split([',', '{', '}']).map(str::trim).filter(|item| !item.is_empty()) {
            found.push(joined(&format!("{}{item}", &path[2])));
        }
    }
    found
}

/// Which modules each module of a crate uses. That a child uses its parent is no use: the parent is there for it.
fn uses(sources: &[(String, String)]) -> BTreeMap<String, BTreeSet<String>> {
    let modules: BTreeSet<&str> = sources.iter().map(|(module, _)| module.as_str()).collect();
    let known = |path: &str| {
        let mut path = path;
        loop {
            if modules.contains(path) {
                return Some(path.to_owned());
            }
            path = path.rsplit_once("::")?.0;
        }
    };
    let mut uses = BTreeMap::new();
    for (module, text) in sources {
        let parent = module.rsplit_once("::").map(|(parent, _)| parent);
        let used = paths(module, without_tests(text)).iter().filter_map(|path| known(path)).collect::<BTreeSet<_>>();
        let used = used.into_iter().filter(|other| other != module && Some(other.as_str()) != parent).collect();
        uses.insert(module.clone(), used);
    }
    uses
}

/// A way from a module back to itself, if there is one.
fn circle(uses: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn follow(
        uses: &BTreeMap<String, BTreeSet<String>>,
        way: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        let here = way.last()?.clone();
        for next in uses.get(&here).into_iter().flatten() {
            if let Some(from) = way.iter().position(|module| module == next) {
                return Some([&way[from..], std::slice::from_ref(next)].concat());
            }
            if !done.contains(next) {
                way.push(next.clone());
                if let Some(found) = follow(uses, way, done) {
                    return Some(found);
                }
                way.pop();
            }
        }
        done.insert(here);
        None
    }
    let mut done = BTreeSet::new();
    uses.keys().find_map(|module| follow(uses, &mut vec![module.clone()], &mut done))
}

fn sources(texts: &[(&str, &str)]) -> Vec<(String, String)> {
    texts.iter().map(|(module, text)| ((*module).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn no_module_uses_itself_in_a_circle() {
    for folder in CRATES {
        let root = workspace().join(folder);
        let sources: Vec<(String, String)> = rust_files(&root)
            .into_iter()
            .map(|(path, text)| (module_of(path.strip_prefix(&root).unwrap()), text))
            .filter(|(module, _)| !is_test(module))
            .collect();
        assert!(sources.len() > 20, "{folder} has only {} modules", sources.len());
        let uses = uses(&sources);
        assert!(uses.values().any(|used| used.len() > 2), "nothing was found in {folder}");
        assert_eq!(circle(&uses), None, "in {folder}");
    }
}

#[test]
fn circles_are_found() {
    let straight = sources(&[("a", "use crate::b::{self, X};"), ("b", "use crate::c;"), ("c", "// crate::a")]);
    assert_eq!(circle(&uses(&straight)), None);
    let parent = sources(&[("a", "use b::Y; crate::a::b::z()"), ("a::b", "use super::X;")]);
    assert_eq!(circle(&uses(&parent)), None, "a parent and its child");
    let round =
        sources(&[("a", "use crate::b::X;"), ("b", "fn f() { crate::c::d::g() }"), ("c::d", "use crate::{a, e};")]);
    assert_eq!(circle(&uses(&round)).unwrap(), ["a", "b", "c::d", "a"]);
    let by_child = sources(&[("a", "use crate::a::b::Y;"), ("a::b", "use crate::c::Z;"), ("c", "use crate::a::X;")]);
    assert_eq!(circle(&uses(&by_child)).unwrap(), ["a", "a::b", "c", "a"]);
}

#[test]
fn no_file_is_too_long_and_no_comment_beyond_the_margin() {
    let mut wrong = Vec::new();
    for folder in FOLDERS {
        for (path, text) in rust_files(&workspace().join(folder)) {
            let path = path.display();
            let lines = text.lines().count();
            if lines > MOST_LINES {
                wrong.push(format!("{path} has {lines} lines"));
            }
            for (number, line) in text.lines().enumerate() {
                let comment = line.trim_start();
                // A row of a table cannot be wrapped.
                let is_row = comment.trim_start_matches(['/', '!', ' ']).starts_with('|');
                if comment.starts_with("//") && !is_row && line.chars().count() > MOST_COLUMNS {
                    wrong.push(format!("{path}:{}: {} columns", number + 1, line.chars().count()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
