//! OpenEXR frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::exr_frame(bytes));
