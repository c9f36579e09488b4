//! The list of tests in an image's file.

use std::collections::HashMap;

use crate::boot::image::section;
use crate::config::{DeviceKind, DeviceOption, IommuOption};

/// A test of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// It resets its machine, which then starts anew; for others a reset is a crash.
    pub reboots: bool,
    /// Options of `causeway run`, besides those of every test and its devices.
    pub options: Vec<String>,
    /// Devices besides the one that every test has.
    pub devices: Vec<(String, DeviceOption)>,
    /// What the behaviour that it checks rests on, if its image says so: a section of a specification.
    pub rests_on: Option<String>,
}

impl Test {
    /// A test that asks for nothing.
    pub fn named(name: &str) -> Self {
        Self { name: name.to_owned(), reboots: false, options: vec![], devices: vec![], rests_on: None }
    }

    /// The behaviour that it checks, by which its name begins: `A-8` of `a8_x`.
    pub fn behaviour(&self) -> Option<String> {
        let id = self.name.split('_').next()?;
        let (letters, number) = id.split_at(id.find(|c: char| c.is_ascii_digit())?);
        let is_id = !letters.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        is_id.then(|| match letters {
            "rule" => format!("rule {number}"),
            _ => format!("{}-{number}", letters.to_uppercase()),
        })
    }

    /// What `--list --json` says of it.
    pub fn as_json(&self) -> serde_json::Value {
        let devices: Vec<&String> = self.devices.iter().map(|(device, _)| device).collect();
        serde_json::json!({"name": self.name, "behaviour": self.behaviour(), "rests_on": self.rests_on,
            "reboots": self.reboots, "options": self.options, "devices": devices})
    }

    /// Whether what it asks of the unit leaves room for an assigned device: without Caching Mode, say, there is none.
    pub fn allows_assigned(&self) -> bool {
        let units = self.options.iter().filter_map(|option| option.parse::<IommuOption>().ok());
        units
            .into_iter()
            .all(|unit| matches!(unit, IommuOption::Vtd(unit) if unit.dma_translation && unit.caching_mode && !unit.has_first_stage() && !unit.second_stage_dirty))
    }
}

/// Stands before the options of a test that resets its machine.
const REBOOTS: &str = "reboots";

/// What an image may ask for, besides emulated devices: it is somebody's file, and `--stats FILE` would write one.
const ALLOWED: [&str; 4] = ["--iommu", "--cpus", "--memory", "--root-ports"];

/// The tests of the image `file`. An image without a list is one test, called `name`.
///
/// # Errors
/// The list is not one, for the user.
pub fn of(file: &[u8], name: &str) -> Result<Vec<Test>, String> {
    let Some(content) = section(file, b".tests") else {
        return Ok(vec![Test::named(name)]);
    };
    let lines = content.split(|byte| matches!(byte, b'\n' | 0)).filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.map(String::from_utf8_lossy).collect();
    // `@A-8 VT-d 7.2`: what a behaviour rests on.
    let said = lines.iter().filter_map(|line| line.strip_prefix('@')?.split_once(' '));
    let said: HashMap<&str, &str> = said.collect();
    let tests = lines.iter().filter(|line| !line.starts_with('@')).map(|line| {
        let test = parse(line)?;
        let rests_on = test.behaviour().and_then(|behaviour| said.get(behaviour.as_str()).map(|what| what.to_string()));
        Ok(Test { rests_on, ..test })
    });
    tests.collect()
}

fn parse(line: &str) -> Result<Test, String> {
    let mut words = line.split_ascii_whitespace().map(str::to_owned);
    let name = words.next().filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'));
    let name =
        name.ok_or_else(|| format!("the image's list of tests has a line that begins with no name: {line:?}"))?;
    let mut words = words.peekable();
    let reboots = words.next_if(|word| word == REBOOTS).is_some();
    let words: Vec<String> = words.collect();
    let (mut options, mut devices) = (Vec::new(), Vec::new());
    for option in words.chunks(2) {
        let refused = || format!("the test {name} asks for {}, which an image may not", option.join(" "));
        match option {
            [key, value] if key == "--device" => {
                let is_allowed = |device: &DeviceOption| {
                    matches!(
                        device.kind,
                        DeviceKind::Edu { .. }
                            | DeviceKind::PinBlk { file: None, direct: false }
                            | DeviceKind::PciBridge
                    )
                };
                let device = value.parse().ok().filter(is_allowed);
                devices.push((value.clone(), device.ok_or_else(refused)?));
            }
            [key, value] if ALLOWED.contains(&key.as_str()) && !value.starts_with('-') => {
                options.extend([key.clone(), value.clone()]);
            }
            _ => return Err(refused()),
        }
    }
    Ok(Test { name, reboots, options, devices, rests_on: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_names_and_options_that_an_image_may_ask_for() {
        let test = parse("a1_x --iommu vtd,aw-bits=57 --device edu").unwrap();
        assert_eq!((test.name.as_str(), test.options.len(), test.devices.len()), ("a1_x", 2, 1));
        assert!(test.allows_assigned() && !test.reboots);
        let bridged = parse("c5_x --root-ports 1 --device pcie-pci-bridge,id=br,port=1 --device edu,bus=br").unwrap();
        assert_eq!((bridged.options.len(), bridged.devices.len()), (2, 2));
        assert_eq!(parse("d3_x --device pinblk --device edu,ats=on,pri=on").unwrap().devices.len(), 2);
        assert!(!parse("a --cpus 2 --iommu vtd,caching-mode=off").unwrap().allows_assigned());
        assert!(!parse("a --iommu vtd,dma-translation=off").unwrap().allows_assigned());
        let test = parse("a11_x reboots --cpus 2").unwrap();
        assert_eq!((test.name.as_str(), test.reboots, test.options.len()), ("a11_x", true, 2));
        for line in [
            "a --stats /x",
            "a --device vfio,host=0:1.0",
            "a --device pinblk,file=/etc/passwd",
            "a --iommu",
            "a --cpus --log",
            "../a",
            "a --cpus 2 reboots",
            "a --reboot",
            "",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_test_checks_the_behaviour_that_its_name_begins_with() {
        let behaviour = |name: &str| Test::named(name).behaviour();
        assert_eq!(behaviour("a8_b2_x").as_deref(), Some("A-8"));
        assert_eq!(behaviour("rule12_x").as_deref(), Some("rule 12"));
        assert_eq!((behaviour("ab_x"), behaviour("8_x"), behaviour("a8b_x"), behaviour("")), (None, None, None, None));
    }

    #[test]
    fn a_file_without_a_list_is_one_test() {
        assert_eq!(of(b"\x7fELF", "x").unwrap(), [Test::named("x")]);
    }
}
