//! The modules that L1 and its guests need, taken out of an unpacked kernel package.
//!
//! A package that was never configured has no `modules.dep`: dependencies are read from the modules themselves
//! (`.modinfo`).

use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

/// One kernel's unpacked modules, by name (with `-` as `_`, as the kernel compares them).
pub struct ModuleTree {
    folder: PathBuf,
    files: HashMap<String, PathBuf>,
}

/// Modules in load order, decompressed.
pub struct Selection {
    /// Path below `lib/modules/<release>/` (without a compression suffix), content, what it needs (names), what it is
    /// also called.
    pub modules: Vec<Module>,
}

pub struct Module {
    pub name: String,
    pub path: String,
    pub content: Vec<u8>,
    depends: Vec<String>,
}

impl ModuleTree {
    /// `folder` is `lib/modules/<release>` of an unpacked package.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = HashMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(&next).with_context(|| format!("cannot list {}", next.display()))? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if let Some(stem) = module_stem(&entry.file_name().to_string_lossy()) {
                    files.insert(normal(stem), entry.path());
                }
            }
        }
        if files.is_empty() {
            bail!("no kernel modules below {}", folder.display());
        }
        Ok(Self { folder: folder.to_owned(), files })
    }

    /// The modules named, and all that they need, each before its users. A name that is not a module of this kernel is
    /// left out: it is built in, or the kernel lacks it, which shows where it is used.
    pub fn select(&self, names: &[&str]) -> Result<Selection> {
        let mut loaded: BTreeMap<String, Module> = BTreeMap::new();
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in names {
            self.visit(&normal(name), &mut seen, &mut loaded, &mut order)?;
        }
        let modules = order.iter().filter_map(|name| loaded.remove(name)).collect();
        Ok(Selection { modules })
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut HashSet<String>,
        loaded: &mut BTreeMap<String, Module>,
        order: &mut Vec<String>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else { return Ok(()) };
        let content = read_module(file)?;
        let depends: Vec<String> = modinfo(&content, "depends")
            .iter()
            .flat_map(|list| list.split(','))
            .filter(|d| !d.is_empty())
            .map(normal)
            .collect();
        for needed in &depends {
            self.visit(needed, seen, loaded, order)?;
        }
        let relative = file.strip_prefix(&self.folder)?.to_string_lossy().into_owned();
        let path = relative.split_once(".ko").map_or(relative.clone(), |(stem, _)| format!("{stem}.ko"));
        loaded.insert(name.to_owned(), Module { name: name.to_owned(), path, content, depends });
        order.push(name.to_owned());
        Ok(())
    }
}

impl Selection {
    /// `modules.dep` for modprobe: each module with all that it needs, nearest first.
    pub fn modules_dep(&self) -> String {
        let by_name: HashMap<&str, &Module> = self.modules.iter().map(|m| (m.name.as_str(), m)).collect();
        let mut text = String::new();
        for module in &self.modules {
            let mut needed: Vec<&str> = Vec::new();
            let mut next: Vec<&str> = module.depends.iter().map(String::as_str).collect();
            while let Some(name) = next.pop() {
                if let Some(found) = by_name.get(name).filter(|m| !needed.contains(&m.path.as_str())) {
                    needed.push(&found.path);
                    next.extend(found.depends.iter().map(String::as_str));
                }
            }
            // Load order is known: what comes later in it is nearer.
            needed.sort_by_key(|path| std::cmp::Reverse(self.modules.iter().position(|m| m.path == *path)));
            text += &format!("{}:{}\n", module.path, needed.iter().map(|path| format!(" {path}")).collect::<String>());
        }
        text
    }
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn module_stem(file: &str) -> Option<&str> {
    [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|suffix| file.strip_suffix(suffix))
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut content = Vec::new();
    let name = file.to_string_lossy();
    if name.ends_with(".xz") {
        lzma_rs::xz_decompress(&mut &bytes[..], &mut content)
            .map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
    } else if name.ends_with(".zst") {
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(&bytes[..])?;
        std::io::Read::read_to_end(&mut decoder, &mut content)?;
    } else if name.ends_with(".ko") {
        content = bytes;
    } else {
        bail!("{}: compressed in a way that is not known here", file.display());
    }
    Ok(content)
}

/// The values of `key` in a module's information, which is a run of NUL-terminated `key=value` strings.
fn modinfo(module: &[u8], key: &str) -> Vec<String> {
    let pattern = format!("{key}=");
    module
        .split(|byte| *byte == 0)
        .filter_map(|text| text.strip_prefix(pattern.as_bytes()))
        .filter_map(|value| std::str::from_utf8(value).ok())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, modules: &[(&str, &str)]) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("xtask-modules-{name}-{}", std::process::id()));
        for (path, depends) in modules {
            let file = folder.join("kernel").join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
        }
        folder
    }

    #[test]
    fn what_a_module_needs_comes_before_it_and_only_once() {
        let folder =
            tree("order", &[("a/top-one.ko", "mid,low"), ("b/mid.ko", "low"), ("low.ko", ""), ("other.ko", "")]);
        let selection = ModuleTree::open(&folder).unwrap().select(&["top_one", "mid", "builtin"]).unwrap();
        let names: Vec<_> = selection.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["low", "mid", "top_one"]);
        assert_eq!(
            selection.modules_dep(),
            "kernel/low.ko:\nkernel/b/mid.ko: kernel/low.ko\nkernel/a/top-one.ko: kernel/b/mid.ko kernel/low.ko\n"
        );
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn modules_that_need_each_other_end() {
        let folder = tree("cycle", &[("a.ko", "b"), ("b.ko", "a")]);
        let selection = ModuleTree::open(&folder).unwrap().select(&["a"]).unwrap();
        assert_eq!(selection.modules.len(), 2);
        selection.modules_dep();
        std::fs::remove_dir_all(folder).unwrap();
    }
}
