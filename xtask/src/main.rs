//! causeway
fn main() {}
