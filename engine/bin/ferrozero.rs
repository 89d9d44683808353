//! The command `ferrozero`.

fn main() {}
