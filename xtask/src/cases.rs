//! The nested cases: shell scripts in `tests/nested`, each with its needs in the comment at its head.
//!
//! `# host: new`, `# memory: 8G`, `# topology: bridge`, `# append: more of L1's kernel command line`, `# cpu: MODEL`,
//! `# kernel: own`, `# limit: SECONDS`, `# needs: CONFIG_NAME` and `# long` stand on lines of their own. Files that end
//! in `lib.sh` are what the cases share.

use crate::cache::workspace;
use crate::l1::Host;
use crate::l1::Images;
use crate::nested::{DEFAULT_CPU, DEFAULT_MEMORY, Files, Kernel, Machine};
use crate::topology::Topology;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const DEFAULT_LIMIT: u64 = 240;

#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    pub machine: Machine,
    pub limit: u64,
    pub long: bool,
    pub needs: Vec<String>,
}

impl Case {
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let machine = Machine {
            host: Host::Default,
            memory: DEFAULT_MEMORY,
            topology: Topology::Flat,
            append: String::new(),
            cpu: DEFAULT_CPU.to_owned(),
            kernel: Kernel::Distribution,
        };
        let mut case = Self { name: name.to_owned(), machine, limit: DEFAULT_LIMIT, long: false, needs: Vec::new() };
        for line in text.lines().map_while(|line| line.strip_prefix('#')) {
            let Some((key, value)) = line.trim().split_once(':').map(|(key, value)| (key, value.trim())) else {
                case.long |= line.trim() == "long";
                continue;
            };
            match key {
                "topology" => {
                    case.machine.topology =
                        Topology::from_str(value, false).map_err(|_| anyhow::anyhow!("{name}: no topology {value}"))?;
                }
                "host" => {
                    case.machine.host =
                        Host::from_str(value, false).map_err(|_| anyhow::anyhow!("{name}: no host {value}"))?;
                }
                "memory" => case.machine.memory = value.parse().map_err(|e| anyhow::anyhow!("{name}: {e}"))?,
                "append" => case.machine.append = value.to_owned(),
                "cpu" => case.machine.cpu = value.to_owned(),
                "kernel" if value == "own" => case.machine.kernel = Kernel::Own,
                "kernel" => bail!("{name}: no kernel {value}"),
                "limit" => case.limit = value.parse().with_context(|| format!("{name}: limit {value}"))?,
                "needs" => case.needs.extend(value.split_whitespace().map(str::to_owned)),
                // A sentence with a colon.
                _ => {}
            }
        }
        Ok(case)
    }

    pub fn full_name(&self) -> String {
        format!("nested::{}", self.name)
    }
}

fn folder() -> PathBuf {
    workspace().join("tests/nested")
}

/// All files of the folder, for L1, and the cases among them.
pub fn load() -> Result<(Files, Vec<Case>)> {
    let (mut files, mut cases) = (Files::new(), Vec::new());
    let entries = std::fs::read_dir(folder()).with_context(|| format!("cannot list {}", folder().display()))?;
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        if !path.is_file() {
            continue;
        }
        files.push((format!("causeway/files/{name}"), path.clone()));
        if let Some(stem) = name.strip_suffix(".sh").filter(|_| !name.ends_with("lib.sh")) {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            cases.push(Case::parse(stem, &text)?);
        }
    }
    files.sort();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((files, cases))
}

/// Where only what is missing for a reason known beforehand may be skipped.
pub fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The configuration of the distribution's kernel.
pub fn kernel_config(images: &Images) -> PathBuf {
    let name =
        images.kernel.file_name().map(|name| name.to_string_lossy().replace("vmlinuz", "config")).unwrap_or_default();
    images.kernel.with_file_name(name)
}

/// The options that a kernel was built with, for `needs`.
pub fn kernel_options(config: &Path) -> HashMap<String, String> {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_says_what_it_needs_in_its_first_comment_only() {
        let text = "# What it shows: a sentence.\n# topology: bridge\n# append: a=1 b=2\n# limit: 30\n# needs: CONFIG_A CONFIG_B\n# long\n\
                    exit 0\n# topology: slot\n";
        let case = Case::parse("x", text).unwrap();
        assert_eq!(case.machine.topology, Topology::Bridge);
        assert_eq!(case.machine.append, "a=1 b=2");
        assert_eq!((case.limit, case.long), (30, true));
        assert_eq!(case.needs, ["CONFIG_A", "CONFIG_B"]);
        assert!(Case::parse("x", "# topology: ring\n").is_err());
        assert_eq!(case.machine.kernel, Kernel::Distribution);
        assert_eq!(Case::parse("x", "# kernel: own\n").unwrap().machine.kernel, Kernel::Own);
        assert!(Case::parse("x", "# kernel: old\n").is_err());
        assert_eq!((case.machine.host, case.machine.memory), (Host::Default, DEFAULT_MEMORY));
        let case = Case::parse("x", "# host: new\n# memory: 8G\n").unwrap();
        assert_eq!((case.machine.host, case.machine.memory.mib), (Host::New, 8192));
        assert!(Case::parse("x", "# host: old\n").is_err());
        for wrong in ["8", "8T", "G", "", "-1G", "4194304G", "255M"] {
            assert!(Case::parse("x", &format!("# memory: {wrong}\n")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_example_of_the_document_is_run_by_a_case() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let document = std::fs::read_to_string(folder.join("docs/nested-bench.md")).unwrap();
        let blocks = document.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
        let examples: Vec<&str> = blocks.filter(|block| block.starts_with("#!/bin/sh\n")).collect();
        assert!(!examples.is_empty());
        let scripts: Vec<String> = std::fs::read_dir(folder.join("tests/nested"))
            .unwrap()
            .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
            .collect();
        for example in examples {
            assert!(scripts.iter().any(|script| script.contains(example)), "no case runs it: {example}");
        }
    }
}
