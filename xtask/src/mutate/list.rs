//! The lists of mutations: `tests/mutations/CRATE.toml`.

use crate::cache::workspace;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;

/// One way to break the code: a place in a file, and what stands there instead.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutation {
    /// The crate whose tests are to notice; from the list's name.
    #[serde(skip)]
    pub package: String,
    /// What is wrong with the code then, in a few words.
    pub name: String,
    /// The file, from the workspace's root.
    pub file: String,
    /// Text that stands in the file exactly once.
    pub find: String,
    /// What it becomes.
    pub replace: String,
    /// Why no test can tell it from the right code.
    #[serde(default)]
    pub equivalent: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutation: Vec<Mutation>,
}

impl Mutation {
    /// What `--only` is compared with.
    pub fn title(&self) -> String {
        format!("{}: {}", self.package, self.name)
    }

    /// The file's text with the mutation in it.
    ///
    /// # Errors
    /// The place is not there, or is there more than once: the code moved on, and the list has to follow.
    pub fn apply(&self, text: &str) -> Result<String> {
        let places = text.matches(&self.find).count();
        ensure!(places == 1, "{}: {} has its place {places} times, not once", self.title(), self.file);
        ensure!(self.find != self.replace, "{}: changes nothing", self.title());
        Ok(text.replacen(&self.find, &self.replace, 1))
    }
}

/// All mutations, in the order of their lists.
pub fn load() -> Result<Vec<Mutation>> {
    let folder = workspace().join("tests/mutations");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut files: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut mutations = Vec::new();
    for file in files {
        mutations.extend(read(&file)?);
    }
    Ok(mutations)
}

fn read(file: &Path) -> Result<Vec<Mutation>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let package = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let list: List = toml::from_str(&text).with_context(|| format!("{} is no list of mutations", file.display()))?;
    let mut names = BTreeSet::new();
    for mutation in &list.mutation {
        ensure!(names.insert(&mutation.name), "{}: `{}` stands there twice", file.display(), mutation.name);
    }
    Ok(list.mutation.into_iter().map(|mutation| Mutation { package: package.clone(), ..mutation }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list whose places are gone measures nothing.
    #[test]
    fn every_mutation_has_its_place_in_the_code() {
        let wrong: Vec<String> = load()
            .unwrap()
            .iter()
            .filter_map(|mutation| {
                let text = std::fs::read_to_string(workspace().join(&mutation.file)).unwrap_or_default();
                mutation.apply(&text).err().map(|error| error.to_string())
            })
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn a_place_that_is_not_there_once_is_an_error() {
        let mutation = Mutation {
            package: "vtd".to_owned(),
            name: "a is b".to_owned(),
            file: "x.rs".to_owned(),
            find: "a".to_owned(),
            replace: "b".to_owned(),
            equivalent: None,
        };
        assert_eq!(mutation.apply("xay").unwrap(), "xby");
        assert!(mutation.apply("xy").is_err() && mutation.apply("aa").is_err());
        assert!(Mutation { replace: "a".to_owned(), ..mutation }.apply("xay").is_err());
    }
}
