/// Arguments that make the linker produce an image. Included by this crate's build script and by that of `vmm`, which
/// embeds the suite.
const LINK_ARGS: &[&str] = &[
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=0x1000",
    "-Wl,--no-dynamic-linker",
];
