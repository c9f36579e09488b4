//! The commands that the documents tell their readers to run.
//!
//! They are in blocks marked `sh` (whole commands), in the lines of a `console` block that begin with `$ `, in the
//! lines of a `text` block that begin with the name of a program of this tree (how it is used, with `[...]` and `a|b`),
//! and in inline code that begins with one. The tests of `vmm` read this file too: each program's own command line
//! decides whether a command of it is right.

use std::fs;
use std::path::{Path, PathBuf};

/// Programs of this tree, and what builds them.
const PROGRAMS: [&str; 2] = ["cargo", "causeway"];
/// Stands for an unquoted `|` without blanks around it until alternatives are told apart.
const ALTERNATIVE: char = '\u{1}';

/// A command, as one of its variants: of `a|b` each is one.
#[derive(Debug, Clone)]
pub struct Command {
    /// Document, and the line where its block begins or its paragraph ends.
    pub place: String,
    /// Without quotes, redirections and assignments; placeholders have something in their place that they could be.
    pub words: Vec<String>,
    /// It is in a block, to be run as it stands. Inline code may leave out what the sentence does not speak of.
    pub whole: bool,
}

/// README.md and its neighbours, and the documents.
pub fn documents(root: &Path) -> Vec<(PathBuf, String)> {
    let mut files: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "SECURITY.md"].map(PathBuf::from).into();
    let entries = fs::read_dir(root.join("docs")).expect("the documents");
    files.extend(entries.map(|entry| Path::new("docs").join(entry.expect("an entry").file_name())));
    for package in ["vtd", "vfio-bridge"] {
        files.push(Path::new(package).join("README.md"));
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.sort();
    let read = |file: PathBuf| {
        let text = fs::read_to_string(root.join(&file)).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        (file, text)
    };
    files.into_iter().map(read).collect()
}

/// All commands of the documents that begin with one of the programs.
pub fn commands(root: &Path) -> Vec<Command> {
    documents(root).iter().flat_map(|(file, text)| commands_of(&file.display().to_string(), text)).collect()
}

/// Those of one document.
pub fn commands_of(name: &str, text: &str) -> Vec<Command> {
    let mut found = Vec::new();
    let mut add = |line: usize, script: &str, whole: bool| {
        for words in shell(script).into_iter().filter(|words| PROGRAMS.contains(&words[0].as_str())) {
            for words in variants(&words) {
                found.push(Command { place: format!("{name}:{line}"), words, whole });
            }
        }
    };
    let mut lines = text.lines().enumerate().peekable();
    let mut paragraph = String::new();
    while let Some((number, line)) = lines.next() {
        let Some(language) = line.trim_start().strip_prefix("```") else {
            // A row of a table that says `no` names what is not there.
            if !line.contains("| no |") {
                let line = if line.starts_with('|') { line.replace("\\|", "|") } else { line.to_owned() };
                paragraph += &format!("{} ", line.trim());
            }
            if line.starts_with('|') || lines.peek().is_none_or(|(_, next)| next.is_empty() || next.contains("```")) {
                inline_code(&paragraph).into_iter().for_each(|code| add(number + 1, code, false));
                paragraph.clear();
            }
            continue;
        };
        let block: Vec<&str> =
            lines.by_ref().map(|(_, line)| line).take_while(|line| !line.trim_start().starts_with("```")).collect();
        let begins = |line: &str| PROGRAMS.iter().any(|name| line.starts_with(&format!("{name} ")));
        match language {
            "sh" => add(number + 1, &block.join("\n"), true),
            "console" => {
                let typed = block.iter().filter_map(|line| line.strip_prefix("$ "));
                typed.for_each(|line| add(number + 1, line, true));
            }
            "text" => {
                let block = block.join("\n").replace("\\\n", " ");
                block.lines().filter(|line| begins(line)).for_each(|line| add(number + 1, line, false));
            }
            _ => {}
        }
    }
    found
}

/// What stands between single backticks and begins with a program.
fn inline_code(paragraph: &str) -> Vec<&str> {
    let code = paragraph.split('`').skip(1).step_by(2);
    code.filter(|code| PROGRAMS.iter().any(|name| code.starts_with(&format!("{name} ")))).collect()
}

/// The commands of a script, each as its words. Of usage, what is optional is there.
fn shell(script: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut word: Option<String> = None;
    let mut redirected = false;
    let mut chars = script.chars().peekable();
    let mut before = ' ';
    // The end of a word: unless it is where something is redirected to, it belongs to the command.
    let end = |word: &mut Option<String>, redirected: &mut bool, commands: &mut Vec<Vec<String>>| {
        if let Some(word) = word.take()
            && !std::mem::take(redirected)
        {
            commands.last_mut().expect("at least one").push(word);
        }
    };
    while let Some(char) = chars.next() {
        let next = chars.peek().copied().unwrap_or(' ');
        match char {
            '\\' if next == '\n' => {
                chars.next();
            }
            '\\' => word.get_or_insert_default().extend(chars.next()),
            '\'' => word.get_or_insert_default().extend(chars.by_ref().take_while(|&char| char != '\'')),
            '"' => word.get_or_insert_default().extend(chars.by_ref().take_while(|&char| char != '"')),
            '$' if next == '(' => {
                let word = word.get_or_insert_default();
                word.push('$');
                let mut depth = 0;
                for char in chars.by_ref() {
                    depth += i32::from(char == '(') - i32::from(char == ')');
                    word.push(char);
                    if depth == 0 {
                        break;
                    }
                }
            }
            '#' if word.is_none() => while chars.next_if(|&char| char != '\n').is_some() {},
            '|' if !before.is_whitespace() && !next.is_whitespace() && next != '|' && before != '|' => {
                word.get_or_insert_default().push(ALTERNATIVE);
            }
            '\n' | ';' | '&' | '|' | '(' | ')' => {
                end(&mut word, &mut redirected, &mut commands);
                commands.push(Vec::new());
            }
            '>' | '<' => {
                // The number of a file descriptor is no word.
                word.take_if(|word| word.chars().all(|char| char.is_ascii_digit()));
                end(&mut word, &mut redirected, &mut commands);
                redirected = true;
                chars.next_if(|&char| char == '>' || char == '&');
            }
            '[' | ']' => {}
            char if char.is_whitespace() => end(&mut word, &mut redirected, &mut commands),
            char => word.get_or_insert_default().push(char),
        }
        before = char;
    }
    end(&mut word, &mut redirected, &mut commands);
    let begun = |words: Vec<String>| -> Vec<String> {
        let passed_by = |word: &String| {
            let assigned =
                word.split_once('=').is_some_and(|(name, _)| name.chars().all(|char| char.is_ascii_uppercase()));
            assigned || ["do", "then", "else", "if", "while", "!", "exec"].contains(&word.as_str())
        };
        words.into_iter().skip_while(passed_by).collect()
    };
    commands.into_iter().map(begun).filter(|words: &Vec<String>| !words.is_empty()).collect()
}

/// The command once for each of its alternatives, with placeholders filled.
fn variants(words: &[String]) -> Vec<Vec<String>> {
    let count = |word: &String| word.split([',', ' ']).map(|piece| piece.matches(ALTERNATIVE).count() + 1).max();
    let most = words.iter().filter_map(count).max().unwrap_or(1);
    (0..most).map(|number| words.iter().map_while(|word| filled(word, number)).flatten().collect()).collect()
}

/// A word with the `number`th of its alternatives. `None` ends the command, an empty option is no word.
fn filled(word: &str, number: usize) -> Option<Option<String>> {
    if word == "VERB" {
        return None;
    }
    let word = word.strip_suffix("...").unwrap_or(word);
    if word.is_empty() {
        return Some(None);
    }
    let one = |piece: &str| {
        let (key, value) = match piece.split_once('=') {
            Some((key, value)) => (format!("{key}="), value),
            None => (String::new(), piece),
        };
        let value = value.split(ALTERNATIVE).take(number + 1).last().unwrap_or(value);
        let value = match value.trim_start_matches('$') {
            "BDF" | "NVME" | "EDU" => "0000:03:00.0",
            "DD.F" => "05.0",
            "SIZE" => "1G",
            "N" | "SECONDS" => "1",
            "CRATE" => "vtd",
            "RE" => ".",
            _ => value,
        };
        key + value
    };
    // A text with blanks is one value, whatever it has in it.
    Some(Some(if word.contains(' ') {
        word.to_owned()
    } else {
        word.split(',').map(one).collect::<Vec<_>>().join(",")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(script: &str) -> Vec<Vec<String>> {
        shell(script).iter().flat_map(|words| variants(words)).collect()
    }

    #[test]
    fn scripts_are_read_as_a_shell_does() {
        let script =
            "CI=true cargo a 'b  c' \"d;e\" \\\n  f 2>/dev/null >x # causeway no\nx | causeway g $(h i) & do cargo j";
        let expected: [&[&str]; 4] =
            [&["cargo", "a", "b  c", "d;e", "f"], &["x"], &["causeway", "g", "$(h i)"], &["cargo", "j"]];
        assert_eq!(words(script), expected);
    }

    #[test]
    fn usage_is_one_command_for_each_alternative() {
        let usage = "cargo a [--b BDF]... [--c x|y|z] --d e=f|g,h=N,i=$NVME ...";
        let with = |c: &str, e: &str| {
            format!("cargo a --b 0000:03:00.0 --c {c} --d e={e},h=1,i=0000:03:00.0")
                .split(' ')
                .map(str::to_owned)
                .collect()
        };
        let expected: [Vec<String>; 3] = [with("x", "f"), with("y", "g"), with("z", "g")];
        assert_eq!(words(usage), expected);
        assert_eq!(words("causeway ctl PATH VERB ..."), [["causeway", "ctl", "PATH"]]);
    }

    #[test]
    fn commands_are_found_in_blocks_and_in_sentences() {
        let text = "Say `cargo\na` and `not cargo`.\n\n\
                    | `causeway b 'c\\|d'` | `x` |\n| `causeway z` | no |\n\n\
                    ```sh\ncauseway e\n```\n```console\n$ cargo f\ncargo g\n```\n\
                    ```text\ncauseway [h]\n  causeway i\n```\n```rust\ncargo j\n```\n`cargo k`\n";
        let found = commands_of("x.md", text);
        let found: Vec<(String, bool)> = found.iter().map(|command| (command.words.join(" "), command.whole)).collect();
        let expected = [
            ("cargo a", false),
            ("causeway b c|d", false),
            ("causeway e", true),
            ("cargo f", true),
            ("causeway h", false),
            ("cargo k", false),
        ];
        assert_eq!(found, expected.map(|(words, whole)| (words.to_owned(), whole)));
    }
}
