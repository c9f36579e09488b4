//! The documents against the tree: the commands that they give are right, and their links lead somewhere.

mod commands;

use crate::Cli;
use crate::behaviours::functions;
use crate::cache::workspace;
use crate::cases;
use crate::crate_tests::cargo;
use crate::pages;
use crate::rust_files::rust_files;
use crate::screenshots::LARGEST;
use crate::test::check_names;
use clap::Parser;
use clap::error::ErrorKind;
use commands::{Command, commands, documents};
use regex::Regex;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a block can be: what is run, what is typed and answered, a picture or usage, and what others look at.
const LANGUAGES: [&str; 6] = ["sh", "console", "text", "rust", "toml", "mermaid"];
/// The name that docs/writing-images.md gives the reader's own package.
const OWN_PACKAGE: &str = "mine";

/// The value behind each `option`.
fn values<'a>(words: &'a [String], option: &str) -> Vec<&'a str> {
    words.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
}

/// Why xtask does not take this command line, if it does not.
fn xtask_refuses(command: &Command) -> Option<String> {
    let refused = |words: &[String]| Cli::try_parse_from(words).err().filter(clap::Error::use_stderr);
    let words = [&["cargo xtask".to_owned()], &command.words[2..]].concat();
    let error = refused(&words)?;
    let incomplete = matches!(
        error.kind(),
        ErrorKind::MissingRequiredArgument | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    (command.whole || !incomplete).then(|| error.to_string())
}

/// The options of cargo that documents use, and whether each has a value.
const CARGO_OPTIONS: [(&str, bool); 7] = [
    ("-p", true),
    ("--test", true),
    ("--example", true),
    ("--release", false),
    ("--workspace", false),
    ("--no-deps", false),
    ("--doc", false),
];

struct Package {
    /// By kind (`test`, `example`, ...) and name.
    targets: BTreeSet<(String, String)>,
    /// The functions, and the modules that tests are in.
    tests: BTreeSet<String>,
}

/// All packages, by name.
fn packages() -> BTreeMap<String, Package> {
    let result = cargo().args(["metadata", "--no-deps", "--offline", "--format-version=1"]).output().unwrap();
    let metadata: Value = serde_json::from_slice(&result.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let package = |package: &Value| {
        let targets = package["targets"].as_array().unwrap().iter();
        let targets = targets.map(|target| (text(&target["kind"][0]), text(&target["name"]))).collect();
        let folder = Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned();
        let mut tests = functions(folder.strip_prefix(workspace()).unwrap().to_str().unwrap());
        let files = rust_files(&folder);
        tests.extend(files.iter().filter_map(|(path, _)| Some(path.file_stem()?.to_string_lossy().into_owned())));
        (text(&package["name"]), Package { targets, tests })
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

/// What is wrong with a command of cargo itself.
fn cargo_refuses(words: &[String], packages: &BTreeMap<String, Package>) -> Option<String> {
    let subcommand = words.get(1)?.as_str();
    if !["test", "run", "build", "doc", "clippy", "fmt", "clean"].contains(&subcommand) {
        return Some("no subcommand that is known here".to_owned());
    }
    let mut filters = Vec::new();
    let (mut package, mut targets) = (None, Vec::new());
    let mut rest = words[2..].iter().map(String::as_str).take_while(|word| *word != "--");
    while let Some(word) = rest.next() {
        let Some((_, has_value)) = CARGO_OPTIONS.iter().find(|(option, _)| *option == word) else {
            filters.push(word);
            continue;
        };
        let value = if *has_value { rest.next()? } else { "" };
        match word {
            "-p" => package = Some(value),
            "--test" | "--example" => targets.push((word[2..].to_owned(), value.to_owned())),
            _ => {}
        }
    }
    if let Some(option) = filters.iter().find(|word| word.starts_with('-')) {
        return Some(format!("{option} is no option that is known here"));
    }
    if package == Some(OWN_PACKAGE) {
        return None;
    }
    let Some(package) = package else {
        let nothing = filters.is_empty() && targets.is_empty();
        return (!nothing).then(|| "a filter or a target without its package".to_owned());
    };
    let Some(known) = packages.get(package) else { return Some(format!("there is no package {package}")) };
    if let Some((kind, name)) = targets.iter().find(|target| !known.targets.contains(target)) {
        return Some(format!("{package} has no {kind} {name}"));
    }
    let filter = filters.iter().find(|filter| !known.tests.iter().any(|test| test.contains(**filter)));
    filter.map(|filter| format!("no test of {package} has {filter} in its name"))
}

/// The names that `cargo xtask test` knows, as far as they can be known without building anything.
fn names_of_tests(packages: &BTreeMap<String, Package>) -> Vec<String> {
    let (_, cases) = cases::load().unwrap();
    let mut names: Vec<String> = cases.iter().map(cases::Case::full_name).collect();
    names.extend(check_names().map(str::to_owned));
    names.extend(pages::names());
    for package in ["vtd", "vfio-bridge", "devices", "vmm", "xtask"] {
        names.extend(packages[package].tests.iter().map(|test| format!("{package}::{test}")));
    }
    let images = functions("tests/images/src/suite");
    for place in ["vfio_user", "emulated", "confined"] {
        names.extend(images.iter().map(|test| format!("images::{place}::{test}")));
    }
    names
}

/// A regular expression, once for each alternative of its first group: none may be there for nothing.
fn alternatives(expression: &str) -> Vec<String> {
    let group = expression.split_once('(').and_then(|(before, rest)| Some((before, rest.split_once(')')?)));
    let Some((before, (group, after))) = group else { return vec![expression.to_owned()] };
    group.split('|').map(|one| format!("{before}{one}{after}")).collect()
}

/// Which part of a regular expression matches none of the names.
fn matches_nothing(expression: &str, names: &[String]) -> Option<String> {
    let expression = expression.replace("NAME", "");
    alternatives(&expression).into_iter().find(|one| {
        let one = Regex::new(one).unwrap_or_else(|error| panic!("{one}: {error}"));
        !names.iter().any(|name| one.is_match(name))
    })
}

#[test]
fn every_block_says_what_it_is() {
    let mut wrong = Vec::new();
    for (file, text) in documents(&workspace()) {
        let fences = text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("```"));
        for (number, line) in fences.step_by(2) {
            if !LANGUAGES.contains(&line.trim_start().trim_start_matches('`')) {
                wrong.push(format!("{}:{}: {line} is none of {LANGUAGES:?}", file.display(), number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_command_of_the_documents_is_right() {
    let packages = packages();
    let names = names_of_tests(&packages);
    let mut wrong = Vec::new();
    let mut checked = BTreeMap::new();
    let image = |name: &String| name.strip_prefix("images::emulated::").map(str::to_owned);
    let images: Vec<String> = names.iter().filter_map(image).collect();
    for command in commands(&workspace()) {
        let words = &command.words;
        let first = [words[0].as_str(), words.get(1).map_or("", String::as_str)];
        let refused = match first {
            ["cargo", "xtask"] => xtask_refuses(&command),
            ["cargo", _] => cargo_refuses(words, &packages),
            // Its command line is checked by the tests of vmm.
            _ => None,
        };
        let only = match (first, words.get(2).map(String::as_str)) {
            (["cargo", "xtask"], Some("test")) => [values(words, "--only"), values(words, "--skip")].concat(),
            (["causeway", "test"], _) | (["cargo", "run"], _) => values(words, "--filter"),
            _ => Vec::new(),
        };
        let dead = only.iter().find_map(|expression| {
            matches_nothing(expression, if first == ["cargo", "xtask"] { &names } else { &images })
        });
        let dead = dead.map(|expression| format!("{expression} matches no test"));
        wrong.extend(refused.or(dead).map(|why| format!("{}: {}\n  {why}", command.place, words.join(" "))));
        *checked.entry(first[1].to_owned()).or_insert(0) += 1;
    }
    assert!(checked["xtask"] > 30 && checked["test"] > 10, "only these were found: {checked:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_nested_case_that_is_named_is_there() {
    let (_, cases) = cases::load().unwrap();
    // Not a module of that name in the tests of a crate.
    let named = Regex::new(r"(?:^|[^:])nested::([a-z0-9_]+)").unwrap();
    let mut wrong = Vec::new();
    for (file, text) in documents(&workspace()) {
        for found in named.captures_iter(&text) {
            if !cases.iter().any(|case| case.name.starts_with(&found[1])) {
                wrong.push(format!("{}: no case begins with nested::{}", file.display(), &found[1]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The anchors of a document, made of its headings as hosts of repositories make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let kept = |char: char| char.is_alphanumeric() || "-_ ".contains(char);
    headings.map(|heading| heading.to_lowercase().replace(|char| !kept(char), "").replace(' ', "-")).collect()
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let link = Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    let root = workspace();
    let mut wrong = Vec::new();
    for (file, text) in documents(&root) {
        let folder = root.join(file.parent().unwrap_or(Path::new("")));
        for found in link.captures_iter(&text).filter(|found| !found[1].contains("://")) {
            let (path, anchor) = found[1].split_once('#').unwrap_or((&found[1], ""));
            let target = if path.is_empty() { root.join(&file) } else { folder.join(path) };
            let there = match std::fs::read_to_string(&target) {
                Ok(text) => anchor.is_empty() || anchors(&text).contains(anchor),
                // A picture is no text.
                Err(_) => anchor.is_empty() && target.exists(),
            };
            if !there {
                wrong.push(format!("{}: {}", file.display(), &found[1]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_picture_is_shown_and_small() {
    let shown = Regex::new(r"!\[[^\]]{20,}\]\((?:docs/)?images/([a-z]+\.png)\)").unwrap();
    let texts: String = documents(&workspace()).into_iter().map(|(_, text)| text).collect();
    let shown: BTreeSet<String> = shown.captures_iter(&texts).map(|found| found[1].to_owned()).collect();
    let mut there = BTreeSet::new();
    for entry in std::fs::read_dir(workspace().join("docs/images")).unwrap() {
        let entry = entry.unwrap();
        assert!(entry.metadata().unwrap().len() <= LARGEST, "{} is large", entry.path().display());
        there.insert(entry.file_name().to_string_lossy().into_owned());
    }
    assert_eq!(shown, there, "pictures that are shown, with what they show for who does not see, and that are there");
    assert!(there.len() >= 2);
}

#[test]
fn what_is_wrong_with_a_command_is_said() {
    let packages = packages();
    let refused = |text: &str| {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        let command = Command { place: String::new(), words, whole: true };
        match command.words[1].as_str() {
            "xtask" => xtask_refuses(&command),
            _ => cargo_refuses(&command.words, &packages),
        }
    };
    for right in [
        "cargo xtask nested --script x --topology zoo",
        "cargo test",
        "cargo test -p vtd",
        "cargo test -p vtd --test unit rule5_",
        "cargo run -p vtd --example listener",
    ] {
        assert_eq!(refused(right), None, "{right}");
    }
    for (wrong, part) in [
        ("cargo xtask demon", "demon"),
        ("cargo xtask", "Usage"),
        ("cargo xtask nested --script x --topology ring", "ring"),
        ("cargo xtask test --onyl x", "--onyl"),
        ("cargo tset", "no subcommand"),
        ("cargo test -p vtx", "no package vtx"),
        ("cargo test -p vtd --test unti", "no test unti"),
        ("cargo test -p vtd nothing_has_this_name", "in its name"),
        ("cargo test --no-such", "no option"),
        ("cargo run --example listener", "without its package"),
    ] {
        assert!(refused(wrong).is_some_and(|why| why.contains(part)), "{wrong}: {:?}", refused(wrong));
    }
    let names = ["nested::a_b".to_owned(), "nested::c".to_owned()];
    assert_eq!(matches_nothing("nested::(a_|c)", &names), None);
    assert_eq!(matches_nothing("nested::(a_|d)", &names).as_deref(), Some("nested::d"));
}
