//! The text form of graphs: parse, verify, print, parse.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::ir_text(bytes));
