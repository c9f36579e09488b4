//! docs/behaviours.md against the tree: each id has its row, and what a row names is there.

use crate::cache::workspace;
use crate::rust_files::rust_files;
use regex::Regex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

/// Whose tests and comments have ids: what the document calls them, and their folders.
const CRATES: [(&str, &str); 5] = [
    ("vtd", "vtd"),
    ("vfio-bridge", "vfio-bridge"),
    ("devices", "devices"),
    ("vmm", "vmm"),
    ("images", "tests/images"),
];

/// The columns of a row of a behaviour: id, what holds, rests on, state, code, shown by. Rows of rules have fewer.
const COLUMNS: usize = 6;

/// How the names of tests begin.
static ID_OF_TEST: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^([a-h]|rule)([0-9]+)_").unwrap());

/// The names of all functions in the Rust files of `folder`.
pub fn functions(folder: &str) -> BTreeSet<String> {
    let function = Regex::new(r"\bfn ([a-z0-9_]+)").unwrap();
    let mut names = BTreeSet::new();
    for (_, text) in rust_files(&workspace().join(folder)) {
        for found in function.captures_iter(&text) {
            names.insert(found[1].to_owned());
        }
    }
    names
}

/// The id that the name of a test begins with: `B-11` of `b11_x`, `rule 5` of `rule5_x`.
fn id_of(test: &str) -> Option<String> {
    let found = ID_OF_TEST.captures(test)?;
    match &found[1] {
        "rule" => Some(format!("rule {}", &found[2])),
        letter => Some(format!("{}-{}", letter.to_uppercase(), &found[2])),
    }
}

/// What the name of a test of `id` has in it: `b11_` of `B-11`.
fn prefix_of(id: &str) -> String {
    format!("{}_", id.to_lowercase().replace(['-', ' '], ""))
}

fn document() -> String {
    std::fs::read_to_string(workspace().join("docs/behaviours.md")).unwrap()
}

/// The cells of each line of a table.
fn cells(document: &str) -> Vec<Vec<&str>> {
    let lines = document.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    lines.map(|line| line.split('|').map(str::trim).collect()).collect()
}

/// The rows of behaviours and rules.
fn rows(document: &str) -> Vec<Vec<&str>> {
    let id = Regex::new(r"^([A-H]-[0-9]+|rule [0-9]+)$").unwrap();
    cells(document).into_iter().filter(|row| id.is_match(row[0])).collect()
}

#[test]
fn every_id_of_a_test_is_in_the_document_of_behaviours() {
    let document = document();
    let rows = rows(&document);
    let known: BTreeSet<&str> = rows.iter().map(|row| row[0]).collect();
    assert_eq!(known.len(), rows.len(), "an id has two rows");
    let in_comment = Regex::new(r"\b[A-H]-[0-9]+\b").unwrap();
    let mut used = BTreeSet::new();
    for (_, folder) in CRATES {
        used.extend(functions(folder).iter().filter_map(|name| id_of(name)));
        for (_, text) in rust_files(&workspace().join(folder)) {
            for (_, comment) in text.lines().filter_map(|line| line.split_once("//")) {
                used.extend(in_comment.find_iter(comment).map(|id| id.as_str().to_owned()));
            }
        }
    }
    assert!(used.len() > 30, "only {used:?} were found");
    let missing: Vec<&String> = used.iter().filter(|id| !known.contains(id.as_str())).collect();
    assert!(missing.is_empty(), "docs/behaviours.md has no row for {missing:?}");
}

#[test]
fn every_behaviour_that_holds_is_named_in_its_file() {
    let document = document();
    let mut wrong = Vec::new();
    for row in rows(&document).iter().filter(|row| row.len() == COLUMNS) {
        let (id, state, code) = (row[0], row[3], row[4]);
        let built = state.starts_with("yes") || state.starts_with("in part: ");
        if !built {
            if !state.starts_with("no") || !code.is_empty() {
                wrong.push(format!("{id}: the state is `{state}`, the code `{code}`"));
            }
            continue;
        }
        let name = Regex::new(&format!(r"\b{id}\b")).unwrap();
        match std::fs::read_to_string(workspace().join(code.trim_matches('`'))) {
            Ok(text) if text.lines().any(|line| line.contains("//") && name.is_match(line)) => {}
            Ok(_) => wrong.push(format!("{id}: no comment of {code} has it")),
            Err(error) => wrong.push(format!("{id}: {code}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_test_that_the_document_of_behaviours_names_is_there() {
    let document = document();
    let by_crate = CRATES.map(|(name, folder)| (name, functions(folder)));
    let mut wrong = Vec::new();

    let images = Regex::new(r"\bimages\b").unwrap();
    for row in rows(&document) {
        // `images::` and `images_` begin the names of single tests.
        let (id, shown) = (row[0], row[row.len() - 1].replace("images::", ""));
        let prefix = prefix_of(id);
        for (name, tests) in &by_crate {
            let named = match *name {
                "images" => images.is_match(&shown),
                name => shown.contains(&format!("`{name}`")),
            };
            let inner = format!("_{prefix}");
            let there = tests.iter().any(|test| test.starts_with(&prefix) || test.contains(&inner));
            if named != there {
                wrong.push(format!("{id}: {name} is named: {named}; it has tests with {prefix}: {there}"));
            }
        }
    }

    let case = Regex::new(r"nested::([a-z0-9_]+)").unwrap();
    for found in case.captures_iter(&document) {
        let file = format!("tests/nested/{}.sh", &found[1]);
        if !workspace().join(&file).is_file() {
            wrong.push(format!("there is no {file}"));
        }
    }

    let mut tests = functions("xtask");
    tests.extend(by_crate.into_iter().flat_map(|(_, tests)| tests));
    let full_name = Regex::new(r"`([a-z][a-z0-9]*_[a-z0-9_]*)`").unwrap();
    for row in cells(&document) {
        for found in full_name.captures_iter(row[row.len() - 1]) {
            if !tests.contains(&found[1]) {
                wrong.push(format!("there is no test {}", &found[1]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_suite_says_what_its_behaviours_rest_on_as_the_document_does() {
    let document = document();
    let rests_on = |row: &Vec<&str>| (row[0].to_owned(), row[2].replace('`', ""));
    let documented: BTreeMap<String, String> =
        rows(&document).iter().filter(|row| row.len() == COLUMNS).map(rests_on).collect();
    let text = std::fs::read_to_string(workspace().join("tests/images/src/rests_on.rs")).unwrap();
    let line = Regex::new(r#"(?m)^    "(.+)" => "(.+)",$"#).unwrap();
    let said: BTreeMap<String, String> =
        line.captures_iter(&text).map(|found| (found[1].to_owned(), found[2].to_owned())).collect();
    assert_eq!(said, documented);
}
