//! docs/mutations.md: which test notices which mutation. All of it is written here; what was found by hand is taken
//! from tests/mutations/by-hand.md.

use super::list::Mutation;
use super::{Outcome, Verdict};
use crate::cache::workspace;
use crate::table;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;

const INTRODUCTION: &str = "\
# What the tests notice

<!-- Written by `cargo xtask mutate`: nothing here is to be edited. `cargo xtask mutate --page` writes it anew. -->

A mutation is one way to break the code. `cargo xtask mutate [CRATE]` puts each of those in
[tests/mutations](../tests/mutations) into a copy of the tree, runs the crate's own tests there until one of them fails,
and writes the table below; `--images` runs the suite of `causeway test` too. A mutation that no test sees is a missing
test, or is equivalent to the right code, and then the list says why. `cargo xtask test` checks that each of them still
has its place in the code. What was tried without the tool is [behind the table](#what-the-suite-notices).

";
const BEGIN: &str = "<!-- The table begins -->\n";
const END: &str = "<!-- The table ends -->\n";
/// Of a mutation that was run and that no test can see.
const EQUIVALENT: &str = "equivalent: ";
const HEAD: [&str; 4] = ["crate", "mutation", "caught by the crate's own tests", "by the image suite"];

/// A row's crate and name, and what stands in its other cells.
type Rows = BTreeMap<(String, String), [String; 2]>;

/// Writes what these mutations came to; what was not run keeps its line, unless the list has it no more.
pub fn update(outcomes: &[Outcome]) -> Result<()> {
    let (file, text) = document()?;
    let page = updated(&text, outcomes, &super::list::load()?, &by_hand()?);
    Ok(std::fs::write(file, page.context("it has no marks that say where the table stands")?)?)
}

/// The file and its text.
fn document() -> Result<(PathBuf, String)> {
    let file = workspace().join("docs/mutations.md");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok((file, text))
}

/// What was found without the tool, and stands behind the table.
fn by_hand() -> Result<String> {
    let file = workspace().join("tests/mutations/by-hand.md");
    std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
}

fn updated(text: &str, outcomes: &[Outcome], listed: &[Mutation], by_hand: &str) -> Option<String> {
    let (_, rest) = text.split_once(BEGIN)?;
    let (table, _) = rest.split_once(END)?;
    let mut old = parse(table);
    let mut rows = Rows::new();
    for mutation in listed {
        let key = key(mutation);
        if let Some([own, images]) = old.remove(&key) {
            // The reason is the list's, whenever the mutation was run.
            let reason = mutation.equivalent.as_ref().filter(|_| own.starts_with(EQUIVALENT));
            rows.insert(key, [reason.map_or(own, |reason| equivalent(reason)), images]);
        }
    }
    for outcome in outcomes {
        let key = key(&outcome.mutation);
        let images = match &outcome.images {
            Some(tests) => caught(tests),
            None => rows.get(&key).map_or(String::new(), |cells| cells[1].clone()),
        };
        rows.insert(key, [own(outcome), images]);
    }
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|((package, name), [own, images])| vec![package, name, own, images]).collect();
    Some(format!("{INTRODUCTION}{BEGIN}\n{}\n{END}\n{by_hand}", table::markdown(&HEAD, &rows)))
}

fn key(mutation: &Mutation) -> (String, String) {
    (mutation.package.clone(), cell(&mutation.name))
}

fn own(outcome: &Outcome) -> String {
    match (&outcome.verdict, &outcome.mutation.equivalent) {
        (Verdict::Killed(tests), _) => caught(tests),
        (Verdict::Survived, Some(reason)) => equivalent(reason),
        (Verdict::Survived, None) => "**none**".to_owned(),
    }
}

fn equivalent(reason: &str) -> String {
    cell(&format!("{EQUIVALENT}{reason}"))
}

fn caught(tests: &[String]) -> String {
    let Some(first) = tests.first() else { return "**none**".to_owned() };
    cell(&format!("`{first}`{}", more(tests.len())))
}

/// How many there are beside the first one.
pub fn more(tests: usize) -> String {
    if tests > 1 { format!(" and {} more", tests - 1) } else { String::new() }
}

fn cell(text: &str) -> String {
    text.replace('|', "/").replace('\n', " ")
}

fn parse(table: &str) -> Rows {
    let row = |line: &str| {
        let cells: Vec<&str> = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect();
        let [package, name, own, images] = cells[..] else { return None };
        Some(((package.to_owned(), name.to_owned()), [own.to_owned(), images.trim().to_owned()]))
    };
    table.lines().filter_map(row).filter(|((package, _), _)| package != HEAD[0] && package != "---").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutation(name: &str) -> Mutation {
        let (file, find, replace) = (String::new(), String::new(), String::new());
        let (package, name) = ("vtd".to_owned(), name.to_owned());
        Mutation { package, name, file, find, replace, equivalent: None }
    }

    fn outcome(name: &str, verdict: Verdict, images: Option<Vec<String>>) -> Outcome {
        Outcome { mutation: mutation(name), verdict, images }
    }

    #[test]
    fn what_was_not_run_keeps_its_line() {
        let listed = ["a", "b"].map(mutation);
        let killed = |name: &str| Verdict::Killed(vec![format!("vtd::{name}"), "vtd::z".to_owned()]);
        let empty = format!("head\n{BEGIN}{END}tail\n");
        let gone = format!("head\n{BEGIN}| vtd | gone | x | y |\n{END}tail\n");
        let first = [outcome("a", killed("x"), Some(vec!["images::i".to_owned()]))];
        let page = updated(&gone, &first, &listed, "by hand\n").unwrap();
        assert_eq!(Some(page.clone()), updated(&empty, &first, &listed, "by hand\n"), "what is not listed goes");
        assert!(
            page.starts_with(INTRODUCTION) && page.ends_with("\nby hand\n"),
            "nothing of the old page stays around it"
        );
        let page = updated(&page, &[outcome("b", Verdict::Survived, None)], &listed, "").unwrap();
        let rows = parse(&page);
        let cells = |name: &str| rows[&("vtd".to_owned(), name.to_owned())].clone();
        assert_eq!(cells("a"), ["`vtd::x` and 1 more".to_owned(), "`images::i`".to_owned()]);
        assert_eq!(cells("b"), ["**none**".to_owned(), String::new()]);
        assert_eq!(rows.len(), 2);
        // A run without the suite leaves its column alone.
        let page = updated(&page, &[outcome("a", killed("y"), None)], &listed, "").unwrap();
        assert_eq!(parse(&page)[&("vtd".to_owned(), "a".to_owned())], ["`vtd::y` and 1 more", "`images::i`"]);
    }

    #[test]
    fn the_reason_of_an_equivalent_one_is_the_lists() {
        let with = |reason: &str| Mutation { equivalent: Some(reason.to_owned()), ..mutation("a") };
        let empty = format!("{BEGIN}{END}");
        let outcome = Outcome { mutation: with("one"), ..outcome("a", Verdict::Survived, None) };
        let page = updated(&empty, &[outcome], &[with("one")], "").unwrap();
        assert!(page.contains("| equivalent: one |"));
        assert!(updated(&page, &[], &[with("another")], "").unwrap().contains("| equivalent: another |"));
    }

    #[test]
    fn a_page_without_marks_is_left_alone() {
        assert!(updated("text", &[], &[], "").is_none());
    }

    #[test]
    fn the_document_is_what_is_written_here_and_has_a_line_for_each_mutation() {
        let ((_, text), listed) = (document().unwrap(), super::super::list::load().unwrap());
        let page = updated(&text, &[], &listed, &by_hand().unwrap()).unwrap();
        assert!(page == text, "docs/mutations.md was edited, or its parts were: cargo xtask mutate --page");
        let rows = parse(&page);
        let not_run: Vec<String> =
            listed.iter().filter(|mutation| !rows.contains_key(&key(mutation))).map(Mutation::title).collect();
        assert!(not_run.is_empty(), "cargo xtask mutate --only RE was not run for {not_run:?}");
    }
}
