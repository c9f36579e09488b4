//! Packages without installing them: apt resolves and downloads into a folder of ours, `dpkg-deb -x` unpacks.
//!
//! The archive's address, its key and how to reach it come from the machine's own apt configuration; only the suite's
//! name is chosen here. apt's idea of what is installed is an empty file, so that the closure is whole and nothing of
//! this machine is used or changed.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Debian's newest release, whose backports have the newest QEMU and kernel.
const NEWEST_RELEASE: &str = "trixie";

/// One archive of the machine's apt configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Archive {
    uri: String,
    components: Vec<String>,
    /// `[signed-by=... ]` options of the one-line style, without the brackets.
    signed_by: Option<String>,
}

/// An apt of our own, with its lists read.
pub struct Apt {
    folder: PathBuf,
    suite: String,
}

/// A package and its version, as `name=version`.
pub type Pinned = String;

impl Apt {
    /// Sets up apt below `folder` and reads the lists of the release and, where the release's QEMU is older than
    /// `oldest_qemu`, of its backports.
    pub fn open(folder: &Path, oldest_qemu: u32) -> Result<Self> {
        let (codename, archive) = machines_archive()?;
        let backports = format!("{codename}-backports");
        let mut seen = None;
        for suites in [vec![&codename], vec![&codename, &backports]] {
            let apt = Self::of_suites(folder, &archive, &suites)?;
            let newest = apt.candidate("qemu-system-x86")?;
            if newest.as_deref().and_then(major_version).is_some_and(|major| major >= oldest_qemu) {
                return Ok(apt);
            }
            seen = newest.or(seen);
        }
        bail!(
            "QEMU {oldest_qemu} or newer is needed; {codename} and {backports} have {}",
            seen.as_deref().unwrap_or("none")
        );
    }

    /// The same of the newest release's backports, whatever release this machine has.
    ///
    /// # Errors
    /// The machine's archive does not have that release, or has an older QEMU there.
    pub fn open_newest(folder: &Path, oldest_qemu: u32) -> Result<Self> {
        let (_, archive) = machines_archive()?;
        let (codename, backports) = (NEWEST_RELEASE.to_owned(), format!("{NEWEST_RELEASE}-backports"));
        let apt = Self::of_suites(folder, &archive, &[&codename, &backports])?;
        let newest = apt.candidate("qemu-system-x86")?;
        ensure!(
            newest.as_deref().and_then(major_version).is_some_and(|major| major >= oldest_qemu),
            "QEMU {oldest_qemu} or newer is needed; {backports} has {}",
            newest.as_deref().unwrap_or("none")
        );
        Ok(apt)
    }

    /// The same of this machine's release alone, for what runs with this machine's own C library.
    ///
    /// # Errors
    /// There is no apt here, or it reaches nothing.
    pub fn open_release(folder: &Path) -> Result<Self> {
        let (codename, archive) = machines_archive()?;
        Self::of_suites(folder, &archive, &[&codename])
    }

    /// The last of the suites is preferred.
    fn of_suites(folder: &Path, archive: &Archive, suites: &[&String]) -> Result<Self> {
        let suite = suites.last().context("no suite")?.to_string();
        let apt = Self { folder: folder.to_owned(), suite };
        apt.configure(archive, suites)?;
        apt.run("apt-get", &["update", "-q"])
            .with_context(|| format!("cannot read the package lists of {}", apt.suite))?;
        Ok(apt)
    }

    fn configure(&self, archive: &Archive, suites: &[&String]) -> Result<()> {
        for below in ["lists/partial", "archives/partial", "none"] {
            std::fs::create_dir_all(self.folder.join(below))?;
        }
        let options = archive.signed_by.as_ref().map_or(String::new(), |key| format!(" signed-by={key}"));
        let sources: String = suites
            .iter()
            .map(|suite| {
                format!("deb [arch=amd64{options}] {} {suite} {}\n", archive.uri, archive.components.join(" "))
            })
            .collect();
        std::fs::write(self.folder.join("sources.list"), sources)?;
        std::fs::write(self.folder.join("status"), "")?;
        let here = self.folder.display();
        let mut config = format!(
            "Dir::State::status \"{here}/status\";\nDir::State::lists \"{here}/lists\";\n\
             Dir::State::extended_states \"{here}/extended_states\";\nDir::Cache \"{here}\";\n\
             Dir::Cache::archives \"{here}/archives\";\nDir::Cache::pkgcache \"\";\nDir::Cache::srcpkgcache \"\";\n\
             Dir::Etc::sourcelist \"{here}/sources.list\";\nDir::Etc::sourceparts \"{here}/none\";\n\
             Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"{here}/none\";\n\
             Dir::Etc::main \"/dev/null\";\nDir::Etc::parts \"{here}/none\";\nDir::Log \"{here}/log\";\n\
             APT::Architecture \"amd64\";\nAPT::Install-Recommends \"false\";\nAPT::Sandbox::User \"root\";\nDebug::NoLocking \"true\";\n"
        );
        // How this machine reaches archives (proxies, certificates), but none of its hooks.
        let dump = output(Command::new("apt-config").arg("dump"))?;
        for line in String::from_utf8_lossy(&dump.stdout).lines() {
            if line.starts_with("Acquire::") && !line.starts_with("Acquire::IndexTargets") {
                config += line;
                config.push('\n');
            }
        }
        config += "Acquire::Languages \"none\";\nAcquire::Retries \"3\";\n";
        std::fs::write(self.folder.join("apt.conf"), config)?;
        Ok(())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let result = output(
            Command::new(program)
                .args(arguments)
                .env("APT_CONFIG", self.folder.join("apt.conf"))
                .env("LC_ALL", "C")
                .current_dir(self.folder.join("archives")),
        )?;
        if !result.status.success() {
            bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&result.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&result.stdout).into_owned())
    }

    fn candidate(&self, package: &str) -> Result<Option<String>> {
        let text = self.run("apt-cache", &["-t", &self.suite, "policy", package])?;
        let version = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        Ok(version.filter(|v| *v != "(none)").map(str::to_owned))
    }

    /// The packages named and all that they depend on.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<Pinned>> {
        let mut arguments = vec!["install", "-s", "-y", "-q", "-t", &self.suite];
        arguments.extend(packages);
        let text = self.run("apt-get", &arguments)?;
        let mut pinned: Vec<Pinned> = text.lines().filter_map(simulated_install).collect();
        pinned.sort();
        ensure!(!pinned.is_empty(), "apt resolved nothing for {}", packages.join(" "));
        Ok(pinned)
    }

    /// `package` and all that it depends on, but not what `bare` of these depend on: each of those comes alone.
    pub fn closure_with_bare(&self, package: &str, bare: &[&str]) -> Result<Vec<Pinned>> {
        let names = self.dependencies(package, "")?;
        let whole: Vec<&str> = names.iter().map(String::as_str).filter(|name| !bare.contains(name)).collect();
        let mut pinned = self.closure(&whole)?;
        for name in bare.iter().chain([&package]) {
            let version = self.candidate(name)?.with_context(|| format!("{} has no {name}", self.suite))?;
            pinned.push(format!("{name}={version}"));
        }
        pinned.sort();
        pinned.dedup();
        Ok(pinned)
    }

    /// The packages that a kernel's metapackage stands for: the image and, where they are apart from it, its modules.
    pub fn kernel(&self) -> Result<Vec<Pinned>> {
        for metapackage in ["linux-image-amd64", "linux-image-generic"] {
            let Some(_) = self.candidate(metapackage)? else { continue };
            let mut pinned = Vec::new();
            let mut names = self.dependencies(metapackage, "linux-image-")?;
            for image in names.clone() {
                // Newer ones: the image, its configuration and its modules are packages of their own.
                for prefix in ["linux-modules-", "linux-binary-", "linux-base-"] {
                    names.extend(self.dependencies(&image, prefix)?);
                }
            }
            names.extend(self.dependencies(metapackage, "linux-modules-extra-")?);
            for name in names {
                let version = self.candidate(&name)?.with_context(|| format!("{name} has no version"))?;
                pinned.push(format!("{name}={version}"));
            }
            pinned.sort();
            pinned.dedup();
            if !pinned.is_empty() {
                return Ok(pinned);
            }
        }
        bail!("no kernel package (linux-image-amd64 or linux-image-generic) in {}", self.suite)
    }

    /// The package with the source of a kernel's package, in the same version where the archive still has it.
    pub fn kernel_source(&self, image: &Pinned) -> Result<Pinned> {
        let (name, version) = image.split_once('=').with_context(|| format!("{image} has no version"))?;
        for source in source_names(name) {
            if self.run("apt-cache", &["show", &format!("{source}={version}")]).is_ok() {
                return Ok(format!("{source}={version}"));
            }
            if let Some(version) = self.candidate(&source)? {
                return Ok(format!("{source}={version}"));
            }
        }
        bail!("no package in {} has the source of {name}", self.suite)
    }

    fn dependencies(&self, package: &str, prefix: &str) -> Result<Vec<String>> {
        let version = self.candidate(package)?.with_context(|| format!("{package} has no version"))?;
        let text = self.run("apt-cache", &["show", "--no-all-versions", &format!("{package}={version}")])?;
        let depends = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(depends
            .split(',')
            .filter_map(|alternative| alternative.split_whitespace().next())
            .filter(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .collect())
    }

    /// Downloads what is not there yet (apt checks sizes, hashes and signatures) and unpacks everything below `tree`.
    pub fn unpack(&self, pinned: &[Pinned], tree: &Path) -> Result<()> {
        let mut arguments = vec!["download", "-q"];
        arguments.extend(pinned.iter().map(String::as_str));
        self.run("apt-get", &arguments).context("cannot download packages")?;
        std::fs::create_dir_all(tree)?;
        for package in pinned {
            let file = self.archive_of(package)?;
            let result = output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(tree))?;
            ensure!(
                result.status.success(),
                "dpkg-deb -x {}: {}",
                file.display(),
                String::from_utf8_lossy(&result.stderr)
            );
        }
        Ok(())
    }

    fn archive_of(&self, pinned: &str) -> Result<PathBuf> {
        let (name, version) = pinned.split_once('=').with_context(|| format!("{pinned} has no version"))?;
        let start = format!("{name}_{}_", version.replace(':', "%3a"));
        for entry in std::fs::read_dir(self.folder.join("archives"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&start) {
                return Ok(entry.path());
            }
        }
        bail!("apt-get download left no {start}*.deb")
    }

    /// The downloaded archives and lists are of no use once the tree stands.
    pub fn discard_downloads(&self) -> Result<()> {
        for below in ["archives", "lists"] {
            std::fs::remove_dir_all(self.folder.join(below))?;
        }
        Ok(())
    }
}

/// The name of this machine's release.
pub fn release() -> Result<String> {
    let release = std::fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|v| v.trim_matches('"').to_owned())
        .context(
            "this system has no apt release name (VERSION_CODENAME): the bench needs Debian 12 or newer, or an Ubuntu with QEMU 10 or newer",
        )
}

/// This machine's release, and the archive that it is from.
fn machines_archive() -> Result<(String, Archive)> {
    let codename = release()?;
    let archive = find_archive(&configured_sources()?, &codename)
        .with_context(|| format!("no source of {codename} with the component main in the apt configuration"))?;
    Ok((codename, archive))
}

fn output(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))
}

/// `Inst name (version ...` of a simulated installation.
fn simulated_install(line: &str) -> Option<Pinned> {
    let mut words = line.strip_prefix("Inst ")?.split_whitespace();
    let name = words.next()?;
    let version = words.find_map(|word| word.strip_prefix('('))?;
    Some(format!("{name}={version}"))
}

/// What distributions call the source of `linux-image-6.12.95+deb12-amd64`: `linux-source-6.12`, or
/// `linux-source-6.12.95`.
fn source_names(image: &str) -> Vec<String> {
    let digits = image.split('-').find(|part| part.starts_with(|c: char| c.is_ascii_digit())).unwrap_or_default();
    let numbers: Vec<&str> =
        digits.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default().split('.').collect();
    let name = |count: usize| numbers.get(..count).map(|first| format!("linux-source-{}", first.join(".")));
    [name(2), name(3)].into_iter().flatten().collect()
}

/// The major upstream version: `1:10.0.2+ds-2` is 10.
fn major_version(version: &str) -> Option<u32> {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    upstream.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn configured_sources() -> Result<Vec<(String, String)>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        more.sort();
        files.extend(more);
    }
    let readable = files.into_iter().filter_map(|file| {
        let kind = file.extension()?.to_str()?.to_owned();
        Some((kind, std::fs::read_to_string(&file).ok()?))
    });
    Ok(readable.filter(|(kind, _)| kind == "list" || kind == "sources").collect())
}

/// The first archive that has `codename` itself with the component main.
fn find_archive(sources: &[(String, String)], codename: &str) -> Option<Archive> {
    sources.iter().find_map(|(kind, text)| match kind.as_str() {
        "sources" => text.split("\n\n").find_map(|stanza| deb822_archive(stanza, codename)),
        _ => text.lines().find_map(|line| one_line_archive(line, codename)),
    })
}

fn deb822_archive(stanza: &str, codename: &str) -> Option<Archive> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in stanza.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            let last = fields.last_mut()?;
            last.1 += "\n";
            last.1 += line;
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let words = |key: &str| -> Vec<String> {
        let value = fields.iter().find(|(k, _)| k == key).map_or("", |(_, v)| v.as_str());
        value.split_whitespace().map(str::to_owned).collect()
    };
    let enabled = !words("enabled").iter().any(|v| v.eq_ignore_ascii_case("no"));
    let has = |key: &str, value: &str| words(key).iter().any(|v| v == value);
    if !enabled || !has("types", "deb") || !has("suites", codename) || !has("components", "main") {
        return None;
    }
    // A key that stands in the stanza itself cannot be named by a one-line source: the machine's trusted keys must do
    // then.
    let signed_by = words("signed-by").into_iter().next().filter(|key| key.starts_with('/'));
    Some(Archive { uri: words("uris").into_iter().next()?, components: words("components"), signed_by })
}

fn one_line_archive(line: &str, codename: &str) -> Option<Archive> {
    let mut rest = line.trim().strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (inside, after) = options.split_once(']')?;
        signed_by = inside.split_whitespace().find_map(|o| o.strip_prefix("signed-by=")).map(str::to_owned);
        rest = after;
    }
    let mut words = rest.split('#').next()?.split_whitespace().map(str::to_owned);
    let uri = words.next()?;
    let suite = words.next()?;
    let components: Vec<String> = words.collect();
    (suite == codename && components.iter().any(|c| c == "main")).then_some(Archive { uri, components, signed_by })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(kind: &str, text: &str) -> Vec<(String, String)> {
        vec![(kind.to_owned(), text.to_owned())]
    }

    #[test]
    fn a_deb822_source_gives_address_components_and_key() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main contrib\nSigned-By: /usr/share/keyrings/a.gpg\n\nTypes: deb\nURIs: http://other.example\n\
                    Suites: bookworm-security\nComponents: main\n";
        let archive = find_archive(&source("sources", text), "bookworm").unwrap();
        assert_eq!(archive.uri, "http://mirror.example/debian");
        assert_eq!(archive.components, ["main", "contrib"]);
        assert_eq!(archive.signed_by.as_deref(), Some("/usr/share/keyrings/a.gpg"));
        assert_eq!(find_archive(&source("sources", text), "trixie"), None);
    }

    #[test]
    fn a_disabled_source_and_a_key_in_the_stanza_are_passed_over() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: noble\nComponents: main\n\n\
                    Types: deb\nURIs: http://on.example\nSuites: noble\nComponents: main universe\nSigned-By:\n -----BEGIN PGP-----\n .\n";
        let archive = find_archive(&source("sources", text), "noble").unwrap();
        assert_eq!((archive.uri.as_str(), archive.signed_by), ("http://on.example", None));
    }

    #[test]
    fn a_one_line_source_may_have_options() {
        let text = "# deb http://no.example bookworm main\ndeb-src http://no.example bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://yes.example/debian bookworm main # the archive\n";
        let archive = find_archive(&source("list", text), "bookworm").unwrap();
        assert_eq!(archive.uri, "http://yes.example/debian");
        assert_eq!(archive.components, ["main"]);
        assert_eq!(archive.signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn versions_and_simulated_installations_are_read() {
        assert_eq!(major_version("1:10.0.2+ds-2+deb13u1~bpo12+1"), Some(10));
        assert_eq!(major_version("7.2+dfsg"), Some(7));
        let line = "Inst libgcc-s1 [1] (12.2.0-14+deb12u1 Debian:12.15/oldstable [amd64]) []";
        assert_eq!(simulated_install(line).as_deref(), Some("libgcc-s1=12.2.0-14+deb12u1"));
        assert_eq!(simulated_install("Conf libgcc-s1 (12)"), None);
        assert_eq!(source_names("linux-image-6.12.95+deb12-amd64"), ["linux-source-6.12", "linux-source-6.12.95"]);
        assert_eq!(source_names("linux-image-6.14.0-15-generic"), ["linux-source-6.14", "linux-source-6.14.0"]);
        assert!(source_names("linux-image-amd64").is_empty());
    }
}
