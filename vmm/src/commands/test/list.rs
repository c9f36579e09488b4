//! The list of tests in an image's file.

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
}

impl Test {
    /// Whether what it asks of the unit leaves room for an assigned device: without Caching Mode there is none.
    pub fn allows_assigned(&self) -> bool {
        let units = self.options.iter().filter_map(|option| option.parse::<IommuOption>().ok());
        units
            .into_iter()
            .all(|unit| matches!(unit, IommuOption::Vtd(unit) if unit.caching_mode && !unit.has_first_stage() && !unit.second_stage_dirty))
    }
}

/// Stands before the options of a test that resets its machine.
const REBOOTS: &str = "reboots";

/// What an image may ask for, besides emulated devices: it is somebody's file, and `--stats FILE` would write one.
const ALLOWED: [&str; 3] = ["--iommu", "--cpus", "--memory"];

/// The tests of the image `file`. An image without a list is one test, called `name`.
///
/// # Errors
/// The list is not one, for the user.
pub fn of(file: &[u8], name: &str) -> Result<Vec<Test>, String> {
    let Some(content) = section(file, b".tests") else {
        return Ok(vec![Test { name: name.to_owned(), reboots: false, options: Vec::new(), devices: Vec::new() }]);
    };
    let lines = content.split(|byte| matches!(byte, b'\n' | 0)).filter(|line| !line.is_empty());
    lines.map(|line| parse(&String::from_utf8_lossy(line))).collect()
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
                    matches!(device.kind, DeviceKind::Edu { .. } | DeviceKind::PinBlk { file: None, direct: false })
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
    Ok(Test { name, reboots, options, devices })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_names_and_options_that_an_image_may_ask_for() {
        let test = parse("a1_x --iommu vtd,aw-bits=57 --device edu").unwrap();
        assert_eq!((test.name.as_str(), test.options.len(), test.devices.len()), ("a1_x", 2, 1));
        assert!(test.allows_assigned() && !test.reboots);
        assert_eq!(parse("d3_x --device pinblk --device edu,ats=on,pri=on").unwrap().devices.len(), 2);
        assert!(!parse("a --cpus 2 --iommu vtd,caching-mode=off").unwrap().allows_assigned());
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
    fn a_file_without_a_list_is_one_test() {
        let test = Test { name: "x".to_owned(), reboots: false, options: Vec::new(), devices: Vec::new() };
        assert_eq!(of(b"\x7fELF", "x").unwrap(), [test]);
    }
}
