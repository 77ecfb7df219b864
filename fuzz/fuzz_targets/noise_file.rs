//! Files of noise, pickles among them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::noise_file(bytes));
