//! Kernels that plan files carry: decoding and verification.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::kernels(bytes));
