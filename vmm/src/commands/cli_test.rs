//! The commands of `causeway` that the documents give, by its own command line.

#[path = "../../../xtask/src/documents/commands.rs"]
mod commands;

use super::Cli;
use clap::Parser;
use clap::error::ErrorKind;
use commands::Command;
use std::path::Path;

/// The words behind `causeway`; `cargo run --release -- WORDS` is `causeway WORDS`.
fn words_of(command: &Command) -> Option<&[String]> {
    let words = &command.words;
    match words[0].as_str() {
        "causeway" => Some(&words[1..]),
        _ if words.get(1).is_some_and(|word| word == "run") && !words.contains(&"-p".to_owned()) => {
            let begin = words.iter().position(|word| word == "--")?;
            Some(&words[begin + 1..])
        }
        _ => None,
    }
}

/// Why this command line is not taken, if it is not.
fn refused(words: &[String], whole: bool) -> Option<String> {
    let program = ["causeway".to_owned()];
    let parse = |more: &[String]| {
        let error = Cli::try_parse_from(program.iter().chain(words).chain(more)).err();
        error.filter(clap::Error::use_stderr)
    };
    // A sentence can name an option without its value, and leave out what it does not speak of.
    let names_option = !whole && words.last().is_some_and(|word| word.starts_with("--"));
    let error = if names_option { parse(&[]).and(parse(&["1".to_owned()]))? } else { parse(&[])? };
    let incomplete = matches!(
        error.kind(),
        ErrorKind::MissingRequiredArgument | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    (whole || !incomplete).then(|| error.to_string())
}

#[test]
fn every_command_of_the_documents_is_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (mut wrong, mut whole) = (Vec::new(), 0);
    for command in commands::commands(&root) {
        let Some(words) = words_of(&command) else { continue };
        whole += usize::from(command.whole);
        let why = refused(words, command.whole);
        wrong.extend(why.map(|why| format!("{}: {}\n  {why}", command.place, command.words.join(" "))));
    }
    assert!(whole >= 8, "only {whole} whole commands were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_wrong_with_a_command_is_said() {
    let refused = |text: &str, whole| refused(&text.split(' ').map(str::to_owned).collect::<Vec<_>>(), whole);
    assert_eq!(refused("run --kernel k --device vfio,host=03:00.0", true), None);
    assert_eq!(refused("run --help", true), None);
    assert_eq!(refused("run --image", false), None);
    assert_eq!(refused("device", false), None);
    for (wrong, part) in [
        ("run", "required"),
        ("run --kernel k --devise edu", "--devise"),
        ("run --kernel k --device vfio,hots=03:00.0", "hots"),
        ("run --kernel k --iommu vtd,aw-bits=40", "40"),
        ("rum --kernel k", "rum"),
    ] {
        assert!(refused(wrong, true).is_some_and(|why| why.contains(part)), "{wrong}: {:?}", refused(wrong, true));
    }
    assert!(refused("run --imago", false).is_some() && refused("run --device vfio,hots=1", false).is_some());
}
