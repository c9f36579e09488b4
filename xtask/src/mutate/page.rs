//! docs/mutations.md: which test notices which mutation. The part between the two marks is written here.

use super::{Outcome, Verdict};
use crate::cache::workspace;
use crate::table;
use anyhow::{Context, Result};
use std::collections::BTreeMap;

const BEGIN: &str = "<!-- Written by `cargo xtask mutate` from here -->\n";
const END: &str = "<!-- to here -->\n";
const HEAD: [&str; 4] = ["crate", "mutation", "caught by the crate's own tests", "by the image suite"];

/// A row's crate and name, and what stands in its other cells.
type Rows = BTreeMap<(String, String), [String; 2]>;

/// Writes what these mutations came to; what was not run keeps its line, unless the list has it no more.
pub fn update(outcomes: &[Outcome]) -> Result<()> {
    let file = workspace().join("docs/mutations.md");
    let text = std::fs::read_to_string(&file).unwrap_or_default();
    let listed: Vec<(String, String)> =
        super::list::load()?.into_iter().map(|mutation| (mutation.package, cell(&mutation.name))).collect();
    let page = replaced(&text, outcomes, &listed).context("it has no marks that say where the table stands")?;
    Ok(std::fs::write(file, page)?)
}

fn replaced(text: &str, outcomes: &[Outcome], listed: &[(String, String)]) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (table, after) = rest.split_once(END)?;
    let mut rows = parse(table);
    rows.retain(|key, _| listed.contains(key));
    for outcome in outcomes {
        let key = (outcome.mutation.package.clone(), cell(&outcome.mutation.name));
        let images = match &outcome.images {
            Some(tests) => caught(tests),
            None => rows.get(&key).map_or(String::new(), |cells| cells[1].clone()),
        };
        rows.insert(key, [own(outcome), images]);
    }
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|((package, name), [own, images])| vec![package, name, own, images]).collect();
    Some(format!("{before}{BEGIN}\n{}\n{END}{after}", table::markdown(&HEAD, &rows)))
}

fn own(outcome: &Outcome) -> String {
    match (&outcome.verdict, &outcome.mutation.equivalent) {
        (Verdict::Killed(tests), _) => caught(tests),
        (Verdict::Survived, Some(reason)) => cell(&format!("equivalent: {reason}")),
        (Verdict::Survived, None) => "**none**".to_owned(),
    }
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
    use super::super::list::Mutation;
    use super::*;

    fn outcome(name: &str, verdict: Verdict, images: Option<Vec<String>>) -> Outcome {
        let (file, find, replace) = (String::new(), String::new(), String::new());
        let (package, name) = ("vtd".to_owned(), name.to_owned());
        let mutation = Mutation { package, name, file, find, replace, equivalent: None };
        Outcome { mutation, verdict, images }
    }

    #[test]
    fn what_was_not_run_keeps_its_line() {
        let listed: Vec<_> = ["a", "b"].map(|name| ("vtd".to_owned(), name.to_owned())).into();
        let killed = |name: &str| Verdict::Killed(vec![format!("vtd::{name}"), "vtd::z".to_owned()]);
        let empty = format!("head\n{BEGIN}{END}tail\n");
        let first = [outcome("a", killed("x"), Some(vec!["images::i".to_owned()])), outcome("gone", killed("x"), None)];
        let page = replaced(&empty, &first, &listed).unwrap();
        assert!(page.starts_with("head\n") && page.ends_with("tail\n"));
        let page = replaced(&page, &[outcome("b", Verdict::Survived, None)], &listed).unwrap();
        let rows = parse(&page);
        let cells = |name: &str| rows[&("vtd".to_owned(), name.to_owned())].clone();
        assert_eq!(cells("a"), ["`vtd::x` and 1 more".to_owned(), "`images::i`".to_owned()]);
        assert_eq!(cells("b"), ["**none**".to_owned(), String::new()]);
        assert_eq!(rows.len(), 2, "what the list has no more is not kept");
        // A run without the suite leaves its column alone.
        let page = replaced(&page, &[outcome("a", killed("y"), None)], &listed).unwrap();
        assert_eq!(parse(&page)[&("vtd".to_owned(), "a".to_owned())], ["`vtd::y` and 1 more", "`images::i`"]);
    }

    #[test]
    fn a_page_without_marks_is_left_alone() {
        assert!(replaced("text", &[], &[]).is_none());
    }
}
