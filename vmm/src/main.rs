//! See the library.

fn main() -> std::process::ExitCode {
    vmm::main()
}
