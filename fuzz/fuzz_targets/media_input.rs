//! Clips and recordings of any origin.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::media_input(bytes));
