//! The MP4 writer with arbitrary sizes, and its reader with arbitrary files.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ltxc_tests::fuzz::mp4_mux(bytes));
