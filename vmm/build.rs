//! Builds the pv machine's shim: the code that runs inside the guest.
//!
//! It is C and assembly because stable Rust cannot produce it: the code must not touch SSE
//! registers, and on `x86_64-unknown-linux-gnu` switching SSE off is being phased out (rustc warns
//! that `-C target-feature=-sse` will become a hard error); the bare-metal targets that
//! allow it need a toolchain component that a plain installation lacks. So: the C compiler, the linker
//! and objcopy, which every Rust installation for this target needs anyway (binutils).

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SHIM: &str = "src/machine/pv/shim";
const SOURCES: [&str; 5] = ["entry.S", "hypercalls.c", "mmu.c", "faults.c", "decode.c"];

fn main() {
    println!("cargo::rerun-if-changed={SHIM}");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    write_layout(&Path::new(SHIM).join("layout.h"), &out.join("layout.rs"));
    let objects = compile();
    let elf = out.join("shim.elf");
    let mut link = Command::new("ld");
    link.args(["-nostdlib", "-static", "--no-warn-rwx-segments", "-T"])
        .arg(format!("{SHIM}/shim.ld"))
        .arg("-o")
        .arg(&elf)
        .args(objects);
    run(&mut link);
    let mut flatten = Command::new("objcopy");
    flatten
        .args(["-O", "binary"])
        .arg(&elf)
        .arg(out.join("shim.bin"));
    run(&mut flatten);
}

fn compile() -> Vec<PathBuf> {
    let mut build = cc::Build::new();
    build
        .files(SOURCES.map(|name| format!("{SHIM}/{name}")))
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .extra_warnings(true)
        .warnings_into_errors(true)
        .cargo_metadata(false)
        .pic(false);
    for flag in [
        "-ffreestanding",
        "-fPIE",
        "-fvisibility=hidden",
        "-fno-jump-tables",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
        "-fno-tree-loop-distribute-patterns",
        "-fcf-protection=none",
        "-mno-red-zone",
        "-mgeneral-regs-only",
        "-mfsgsbase",
    ] {
        build.flag(flag);
    }
    build.compile_intermediates()
}

fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("{command:?}: {error} (is binutils installed?)"));
    assert!(status.success(), "{command:?} failed");
}

/// Every `#define NAME NUMBER` becomes a constant.
fn write_layout(header: &Path, rust: &Path) {
    let text = fs::read_to_string(header).expect("layout.h is readable");
    let mut constants = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("#define") {
            continue;
        }
        if let (Some(name), Some(value), None) = (words.next(), words.next(), words.next()) {
            writeln!(
                constants,
                "#[doc = \"`{name}` of `shim/layout.h`.\"]\npub const {name}: u64 = {value};"
            )
            .expect("a String takes all");
        }
    }
    fs::write(rust, constants).expect("OUT_DIR is writable");
}
