//! The list of tests in an image's file.

use crate::image::section;

/// A test of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Test {
    /// Its name.
    pub name: String,
    /// Options of `causeway run`, besides those of every test.
    pub options: Vec<String>,
}

/// What an image may ask for: it is somebody's file, and `--stats FILE` would write one.
const ALLOWED: [&str; 4] = ["--iommu", "--cpus", "--memory", "--device"];

/// The tests of the image `file`. An image without a list is one test, called `name`.
///
/// # Errors
/// The list is not one, for the user.
pub fn of(file: &[u8], name: &str) -> Result<Vec<Test>, String> {
    let Some(content) = section(file, b".tests") else {
        return Ok(vec![Test { name: name.to_owned(), options: Vec::new() }]);
    };
    let lines = content.split(|byte| matches!(byte, b'\n' | 0)).filter(|line| !line.is_empty());
    lines.map(|line| parse(&String::from_utf8_lossy(line))).collect()
}

fn parse(line: &str) -> Result<Test, String> {
    let mut words = line.split_ascii_whitespace().map(str::to_owned);
    let name = words.next().filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'));
    let name =
        name.ok_or_else(|| format!("the image's list of tests has a line that begins with no name: {line:?}"))?;
    let options: Vec<String> = words.collect();
    for option in options.chunks(2) {
        let allowed = match option {
            [key, value] if key == "--device" => value == "edu" || value.starts_with("edu,"),
            [key, value] => ALLOWED.contains(&key.as_str()) && !value.starts_with('-'),
            _ => false,
        };
        if !allowed {
            return Err(format!("the test {name} asks for {}, which an image may not", option.join(" ")));
        }
    }
    Ok(Test { name, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_names_and_options_that_an_image_may_ask_for() {
        let test = parse("a1_x --iommu vtd,aw-bits=57 --device edu").unwrap();
        assert_eq!((test.name.as_str(), test.options.len()), ("a1_x", 4));
        for line in ["a --stats /x", "a --device vfio,host=0:1.0", "a --iommu", "a --cpus --log", "../a", ""] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_file_without_a_list_is_one_test() {
        assert_eq!(of(b"\x7fELF", "x").unwrap(), [Test { name: "x".to_owned(), options: Vec::new() }]);
    }
}
