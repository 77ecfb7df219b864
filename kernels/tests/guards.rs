//! Failures of a device that CubeCL does not report, provoked on Vulkan: each is an error where results are read.
//!
//! What was noted stays noted as long as the process lives, so every scenario runs in one of its own.
//! Without a Vulkan device they are skipped, unless `LTXC_REQUIRE_VULKAN=1`.
#![cfg(feature = "wgpu")]

use std::process::Command;
use std::time::Duration;

use cubecl::future::block_on;
use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::server::KernelArguments;
use cubecl::wgpu::{AutoCompiler, AutoGraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime, WgpuSetup, init_setup};
use cubecl::{CompilationError, Compiler, CubeTask};
use cubecl_runtime::id::KernelId;
use half::bf16;
use ltxc_kernels::cube::guard;

type Client = ComputeClient<WgpuRuntime>;

/// Begins the line with what a scenario found.
const FOUND: &str = "found: ";

/// Names the scenario that a process is there for.
const SCENARIO: &str = "LTXC_GUARD_SCENARIO";

const SCENARIOS: [(&str, fn()); 8] = [
    ("panic_of_the_compiler", scenarios::panic_of_the_compiler),
    ("cube_of_too_many_units", scenarios::cube_of_too_many_units),
    ("source_with_a_mistake", scenarios::source_with_a_mistake),
    ("too_many_cubes", scenarios::too_many_cubes),
    ("odd_offset", scenarios::odd_offset),
    ("too_much_memory", scenarios::too_much_memory),
    ("lost_device", scenarios::lost_device),
    ("refused_before_submission", scenarios::refused_before_submission),
];

/// What the processes run that the other tests start; on its own it has nothing to do.
#[test]
fn scenario() {
    if let Ok(name) = std::env::var(SCENARIO) {
        let (_, run) = SCENARIOS.iter().find(|(known, _)| *known == name).expect("a known scenario");
        run();
    }
}

/// Runs a scenario and compares what it found with these words.
#[track_caller]
fn provoke(scenario: &str, words: &[&str]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "scenario", "--nocapture"]).env(SCENARIO, scenario);
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}{stderr}");
    if stderr.contains("skipped: no Vulkan device") {
        return println!("skipped: no Vulkan device");
    }
    assert!(!stderr.contains("panicked"), "what becomes an error is printed too: {stderr}");
    let found = stdout.split(FOUND).nth(1).unwrap_or_else(|| panic!("nothing was found: {stdout}{stderr}"));
    words.iter().for_each(|word| assert!(found.contains(word), "`{word}` is not in: {found}"));
}

#[test]
fn a_kernel_that_cannot_be_written_is_an_error() {
    provoke("panic_of_the_compiler", &["the device failed", "bf16"]);
}

#[test]
fn a_launch_that_is_refused_is_an_error() {
    provoke("cube_of_too_many_units", &["the device failed"]);
}

#[test]
fn source_that_does_not_compile_is_an_error() {
    provoke("source_with_a_mistake", &["the device failed", "WGSL compilation failed"]);
}

#[test]
fn a_validation_error_is_an_error_and_not_the_end() {
    provoke("too_many_cubes", &["the device failed", "65536"]);
}

#[test]
fn a_binding_at_an_odd_offset_is_an_error() {
    provoke("odd_offset", &["the device failed", "offset"]);
}

#[test]
fn memory_that_does_not_fit_is_an_error() {
    provoke("too_much_memory", &["the device failed"]);
}

#[test]
fn a_device_that_is_lost_is_an_error() {
    provoke("lost_device", &["the device failed", "lost"]);
}

#[test]
fn what_is_submitted_is_checked_too() {
    provoke("refused_before_submission", &["the device failed"]);
}

#[cube(launch_unchecked)]
fn add_one(values: &mut Array<f32>) {
    if ABSOLUTE_POS < values.len() {
        values[ABSOLUTE_POS] += 1.0;
    }
}

#[cube(launch_unchecked)]
fn add_one_bf16(values: &mut Array<bf16>) {
    if ABSOLUTE_POS < values.len() {
        values[ABSOLUTE_POS] += bf16::from_int(1);
    }
}

/// A kernel of text that is none.
struct Mistake;

impl KernelMetadata for Mistake {
    fn id(&self) -> KernelId {
        KernelId::new::<Mistake>()
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

impl CubeTask<AutoCompiler> for Mistake {
    fn compile(
        &self,
        _: &mut AutoCompiler,
        _: &<AutoCompiler as Compiler>::CompilationOptions,
        _: ExecutionMode,
        _: StorageType,
    ) -> Result<CompiledKernel<AutoCompiler>, CompilationError> {
        Ok(CompiledKernel {
            entrypoint_name: "main".into(),
            debug_name: None,
            source: "fn main( {".into(),
            repr: None,
            cube_dim: CubeDim::new_1d(1),
            debug_info: None,
        })
    }
}

/// The device, or the end of this process where there is none.
fn client() -> Client {
    open().0
}

fn open() -> (Client, WgpuSetup) {
    let open = || init_setup::<AutoGraphicsApi>(&WgpuDevice::DefaultDevice, RuntimeOptions::default());
    let Ok(setup) = std::panic::catch_unwind(open) else {
        assert!(std::env::var_os("LTXC_REQUIRE_VULKAN").is_none_or(|v| v != "1"), "no Vulkan device");
        eprintln!("skipped: no Vulkan device");
        std::process::exit(0);
    };
    guard::install();
    guard::watch_wgpu(&setup);
    (WgpuRuntime::client(&WgpuDevice::DefaultDevice), setup)
}

fn launch(client: &Client, values: &cubecl::server::Handle, cubes: u32, units: u32) {
    let length = values.size_in_used() as usize / 4;
    // SAFETY: units beyond the values do nothing.
    unsafe {
        let values = ArrayArg::from_raw_parts(values.clone(), length);
        add_one::launch_unchecked::<WgpuRuntime>(
            client,
            CubeCount::Static(cubes, 1, 1),
            CubeDim::new_1d(units),
            values,
        );
    }
}

fn report(error: Result<(), String>) {
    println!("{FOUND}{}", error.expect_err("the failure was silent"));
}

mod scenarios {
    use super::*;

    /// The compiler panics on the thread of the device, and the launch is dropped.
    pub fn panic_of_the_compiler() {
        let client = client();
        let values = client.create_from_slice(&[0; 8]);
        // SAFETY: nothing runs.
        unsafe {
            let array = ArrayArg::from_raw_parts(values.clone(), 4);
            add_one_bf16::launch_unchecked::<WgpuRuntime>(
                &client,
                CubeCount::Static(1, 1, 1),
                CubeDim::new_1d(32),
                array,
            );
        }
        assert!(block_on(client.sync()).is_ok(), "CubeCL reports it now: `guard` can be simpler");
        assert_eq!(client.read_one(values).unwrap()[..], [0; 8], "CubeCL gives old memory");
        report(guard::sync(&client));
    }

    /// The driver would refuse it; only a sync says so, and once.
    pub fn cube_of_too_many_units() {
        let client = client();
        let values = client.create_from_slice(&[0; 64]);
        launch(&client, &values, 1, 1 << 16);
        assert!(client.read_one(values.clone()).is_ok(), "CubeCL reports it now: `guard` can be simpler");
        let found = guard::sync(&client);
        launch(&client, &values, 1, 16);
        guard::sync(&client).expect("the device goes on");
        let ones = client.read_one(values).unwrap();
        assert!(ones.chunks(4).all(|one| one == 1f32.to_ne_bytes()));
        report(found);
    }

    pub fn source_with_a_mistake() {
        let client = client();
        client.launch(Box::new(Mistake), CubeCount::Static(1, 1, 1), KernelArguments::new());
        report(guard::sync(&client));
    }

    /// wgpu would end the process.
    pub fn too_many_cubes() {
        let client = client();
        let values = client.create_from_slice(&[0; 64]);
        launch(&client, &values, 1 << 16, 1);
        report(guard::sync(&client));
        assert!(guard::check_poisoned().is_err(), "memory stays suspect");
    }

    pub fn odd_offset() {
        let client = client();
        let values = client.create_from_slice(&[0; 64]);
        launch(&client, &values.offset_start(4), 1, 16);
        report(guard::sync(&client));
    }

    /// The pools of CubeCL panic on the thread of the device.
    pub fn too_much_memory() {
        let client = client();
        let values = client.empty(1 << 40);
        launch(&client, &values.offset_end((1 << 40) - 64), 1, 16);
        report(guard::sync(&client));
    }

    pub fn lost_device() {
        let (client, setup) = open();
        let values = client.create_from_slice(&[0; 64]);
        guard::sync(&client).unwrap();
        setup.device.destroy();
        launch(&client, &values, 1, 16);
        let mut found = guard::sync(&client);
        assert!(found.is_err(), "the failure was silent");
        // That the device is lost is told by the thread that polls it, mostly before, sometimes a moment after.
        for _ in 0..100 {
            if found.as_ref().is_err_and(|error| error.contains("lost")) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            found = guard::sync(&client);
        }
        report(found);
    }

    pub fn refused_before_submission() {
        let client = client();
        let values = client.create_from_slice(&[0; 64]);
        launch(&client, &values, 1, 1 << 16);
        report(guard::submit(&client));
    }
}
