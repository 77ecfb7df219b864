//! Plan files: decoding, verification and everything that looks at a plan before it runs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::plan(bytes));
