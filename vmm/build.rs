//! Builds the suite of `causeway test`, which is embedded. The compiler is called directly: cargo cannot embed another
//! package's binary on a stable toolchain, and the images need nothing but `core`.

use std::path::{Path, PathBuf};
use std::process::Command;

include!("../tests/images/link_args.rs");

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("cargo did not set {name}"))
}

fn compile(sources: &Path, out: &Path, file: &str, arguments: &[String]) {
    let mut command = Command::new(variable("RUSTC"));
    command.arg(sources.join("src").join(file)).arg("--out-dir").arg(out);
    command.args(["--edition=2024", "-Cpanic=abort", "-Copt-level=2", "-Ccodegen-units=1", "-Ctarget-cpu=x86-64"]);
    command.args(["-Cstrip=debuginfo", "--cap-lints=allow", "--color=never"]);
    // Places in messages are those of the tree, whatever machine it was built on.
    command.arg(format!("--remap-path-prefix={}=tests/images", sources.display()));
    command.args(arguments);
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("the test images do not compile:\n{}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => panic!("{command:?} cannot be run: {e}"),
    }
}

fn main() {
    let out = PathBuf::from(variable("OUT_DIR"));
    let sources = Path::new(&variable("CARGO_MANIFEST_DIR")).join("../tests/images");
    let sources = sources.canonicalize().unwrap_or_else(|e| panic!("{} is not there: {e}", sources.display()));
    for part in ["src", "link.ld", "link_args.rs"] {
        println!("cargo:rerun-if-changed={}", sources.join(part).display());
    }
    let text = |parts: &[&str]| parts.iter().map(|part| part.to_string()).collect::<Vec<_>>();
    compile(&sources, &out, "lib.rs", &text(&["--crate-name=images", "--crate-type=rlib"]));
    let mut arguments = text(&["--crate-name=suite", "--crate-type=bin"]);
    arguments.push(format!("--extern=images={}", out.join("libimages.rlib").display()));
    arguments.extend(LINK_ARGS.iter().map(|argument| format!("-Clink-arg={argument}")));
    arguments.push(format!("-Clink-arg=-T{}", sources.join("link.ld").display()));
    compile(&sources, &out, "main.rs", &arguments);
}
