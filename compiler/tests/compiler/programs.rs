//! What the plan builder makes of several programs, and what it refuses.

use crate::support::interp::Interpreter;
use crate::support::{self, builder, pipeline};
use ltxc_compiler::{CompileError, Options};
use ltxc_ir::eval::Tensor;
use ltxc_ir::ops::{Attention, ReduceKind, RopeLayout};
use ltxc_ir::plan::verify::verify;
use ltxc_ir::plan::{Plan, SlotPlace, Step, Target, WeightOrigin};
use ltxc_ir::{Builder, DType, Function, Module, Rate, TensorType};

fn single(name: &str, body: impl FnOnce(&Builder)) -> Module {
    let b = Builder::new(name);
    body(&b);
    Module { functions: vec![b.finish().unwrap()], entries: vec![name.into()] }
}

/// A transformer block with rotary embedding, text attention and modulation, at toy sizes.
fn block(tokens: usize, text: usize, channels: usize) -> Function {
    let b = Builder::new("block");
    let (n, d) = (2, channels / 2);
    let x = b.param("x", TensorType::f32([1, tokens, channels]), Rate::Step);
    let context = b.param("context", TensorType::f32([1, text, channels]), Rate::Step);
    let cos = b.param("cos", TensorType::f32([1, tokens, n, d / 2]), Rate::Step);
    let sin = b.param("sin", TensorType::f32([1, tokens, n, d / 2]), Rate::Step);
    let weight = |key: &str, shape: [usize; 2]| b.weight("model", key, TensorType::f32(shape));
    let project = |x, key: &str| b.matmul_transposed(x, weight(key, [channels, channels]));
    let heads = |v, t: usize| b.reshape(v, &[1, t, n, d]);
    let attention = Attention { scale: 1.0.into(), causal: false };
    let h = b.rms_norm(x, None, 1e-6);
    let rotated = |key: &str| b.rope(heads(project(h, key), tokens), cos, sin, RopeLayout::Split);
    let (q, k) = (rotated("attn1.to_q"), rotated("attn1.to_k"));
    let o = b.attention(attention.clone(), q, k, heads(project(h, "attn1.to_v"), tokens), None);
    let x = b.add(x, project(b.reshape(o, &[1, tokens, channels]), "attn1.to_out"));
    let k = b.name("attn2.k", b.rms_norm(project(context, "attn2.to_k"), None, 1e-6));
    let v = b.name("attn2.v", project(context, "attn2.to_v"));
    let o = b.attention(attention, heads(project(x, "attn2.to_q"), tokens), heads(k, text), heads(v, text), None);
    b.result("x", b.add(x, b.reshape(o, &[1, tokens, channels])));
    b.finish().unwrap()
}

fn transformer(blocks: usize) -> Module {
    let (tokens, text, channels) = (6, 3, 16);
    let block = block(tokens, text, channels);
    let b = Builder::new("main");
    let latent = b.param("latent", TensorType::f32([1, tokens, channels]), Rate::Step);
    let context = b.param("context", TensorType::f32([1, text, channels]), Rate::Generation);
    let positions = b.param("positions", TensorType::f32([1, tokens, 2, channels / 4]), Rate::Generation);
    let cos = b.unary(ltxc_ir::ops::Unary::Cos, positions);
    let sin = b.unary(ltxc_ir::ops::Unary::Sin, positions);
    let mut x = latent;
    for i in 0..blocks {
        x = b.call(&block, &format!("blocks.{i}"), &format!("blocks.{i}."), &[x, context, cos, sin])[0];
    }
    b.result("velocity", x);
    Module { functions: vec![block, b.finish().unwrap()], entries: vec!["main".into()] }
}

#[test]
fn text_keys_and_rotary_tables_are_computed_once_per_generation() {
    let plan = support::plan(&transformer(4), Options::default(), Target::cpu());
    let names: Vec<&str> = plan.programs.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["main.generation", "main"]);
    let crossing: Vec<&str> = plan.programs[0].outputs.iter().map(|s| s.name.as_str()).collect();
    assert!(crossing.contains(&"blocks.0.attn2.k") && crossing.contains(&"blocks.3.attn2.v"), "{crossing:?}");
    assert_eq!(crossing.len(), 2 + 2 * 4);
    for slot in &plan.programs[0].outputs {
        assert!(matches!(slot.place, SlotPlace::State { .. }), "{slot:?}");
        assert_eq!(plan.programs[1].input(&slot.name), Some(slot));
    }
    // The step program computes nothing from the text any more.
    assert!(plan.programs[1].input("context").is_none());
}

#[test]
fn repeated_blocks_are_stored_once() {
    let [few, many] = [4, 40].map(|n| support::plan(&transformer(n), Options::default(), Target::cpu()));
    assert_eq!(few.functions.len(), many.functions.len());
    // One frame serves all of them, and the text keys are not in it.
    assert_eq!(few.programs[1].arena_bytes, many.programs[1].arena_bytes);
}

#[test]
fn programs_share_equal_functions() {
    let mut plan = builder(Options::default(), Target::cpu());
    plan.add("a", "first", &transformer(2), "main").unwrap();
    plan.add("b", "second", &transformer(2), "main").unwrap();
    let plan = plan.finish(pipeline()).unwrap();
    let alone = support::plan(&transformer(2), Options::default(), Target::cpu());
    assert_eq!(plan.functions.len(), alone.functions.len());
    assert_eq!(plan.groups.len(), 2);
}

#[test]
fn a_result_that_another_program_takes_lies_in_the_state() {
    let ty = TensorType::f32([4]);
    let write = single("main", |b| {
        let x = b.param("x", ty.clone(), Rate::Step);
        b.result("latent", b.silu(x));
    });
    let read = single("main", |b| {
        let x = b.param("latent", ty.clone(), Rate::Step);
        b.result("frames", b.gelu(x));
    });
    let mut plan = builder(Options::default(), Target::cpu());
    plan.add("group", "write", &write, "main").unwrap();
    plan.add("group", "read", &read, "main").unwrap();
    let plan = plan.finish(pipeline()).unwrap();
    let args = support::arguments(&write, "main", 3);
    let mut interpreter = Interpreter::new(&plan);
    let latent = interpreter.run("write", &args);
    let frames = interpreter.run("read", &[]);
    assert_eq!(frames, support::evaluate(&read, "main", &latent));
}

/// Writes `part` into `cache`, inside of a called function, and sums up what is there then; and what was there before, if
/// `reads_old`.
fn appending(rows: usize, reads_old: bool) -> Module {
    let (cache, part) = (TensorType::f32([1, 6, 2]), TensorType::f32([1, rows, 2]));
    let b = Builder::new("layer");
    let params = [("cache", cache.clone()), ("part", part.clone()), ("row", TensorType::i32([]))];
    let [old, new, row] = params.clone().map(|(name, ty)| b.param(name, ty, Rate::Step));
    let updated = b.update(old, b.silu(new), row, 1);
    b.result("sum", b.reduce(ReduceKind::Sum, updated, &[1]));
    b.result("cache", updated);
    if reads_old {
        b.result("before", b.reduce(ReduceKind::Sum, old, &[1]));
    }
    let layer = b.finish().unwrap();
    let b = Builder::new("main");
    let args = params.map(|(name, ty)| b.param(name, ty, Rate::Step));
    let results = b.call(&layer, "layer", "", &args);
    for (name, value) in ["sum", "cache", "before"].into_iter().zip(results) {
        b.result(name, value);
    }
    Module { functions: vec![layer, b.finish().unwrap()], entries: vec!["main".into()] }
}

#[test]
fn state_is_updated_in_place_where_nothing_reads_it_afterwards() {
    let modules = [("several", appending(3, false)), ("one", appending(1, false))];
    let mut plan = builder(Options::default(), Target::cpu());
    for (name, module) in &modules {
        plan.add("group", name, module, "main").unwrap();
    }
    let plan = plan.finish(pipeline()).unwrap();
    let mut interpreter = Interpreter::new(&plan);
    let mut cache = Tensor::zeros(TensorType::f32([1, 6, 2]));
    for (run, (name, module)) in [0, 1, 1, 0].map(|i| &modules[i]).into_iter().enumerate() {
        let slots = plan.program(name).map(|p| (p.input("cache").unwrap().place, p.output("cache").unwrap().place));
        assert_eq!(slots.unwrap(), (SlotPlace::State { offset: 0 }, SlotPlace::State { offset: 0 }));
        let mut args = support::arguments(module, "main", run as u64);
        args.iter_mut().find(|(name, _)| name == "row").unwrap().1 = Tensor::i32(&[], &[2 * run as i32]);
        args.retain(|(name, _)| name != "cache" || run == 0);
        let found = interpreter.run(name, &args);
        args.retain(|(name, _)| name != "cache");
        let start = if run == 0 { support::arguments(module, "main", 0).swap_remove(0).1 } else { cache };
        args.insert(0, ("cache".into(), start));
        let expected = support::evaluate(module, "main", &args);
        assert_eq!(found, expected, "run {run} of `{name}`");
        cache = expected.into_iter().find(|(name, _)| name == "cache").unwrap().1;
    }
}

#[test]
fn state_that_is_read_after_it_was_written_is_not_updated_in_place() {
    let mut plan = builder(Options::default(), Target::cpu());
    plan.add("group", "reads", &appending(1, true), "main").unwrap();
    plan.add("group", "writes", &appending(1, false), "main").unwrap();
    let mut plan = plan.finish(pipeline()).unwrap();
    let places = |plan: &Plan, name: &str| {
        let program = plan.program(name).unwrap();
        (program.input("cache").unwrap().place, program.output("cache").unwrap().place)
    };
    let (before, after) = places(&plan, "reads");
    assert!(matches!(before, SlotPlace::State { .. }) && matches!(after, SlotPlace::Arena { .. }));
    let (before, after) = places(&plan, "writes");
    assert_eq!(before, after);
    // A plan that claims otherwise is refused.
    let slot = plan.programs[0].outputs.iter_mut().find(|slot| slot.name == "cache").unwrap();
    slot.place = before;
    let problem = verify(&plan).unwrap_err().to_string();
    assert!(problem.contains("slot `cache` overlaps"), "{problem}");
}

#[test]
fn recipes_are_bound_to_the_keys_of_their_call() {
    let b = Builder::new("layer");
    let x = b.param("x", TensorType::f32([2, 4]), Rate::Step);
    let w = b.weight("model", "weight", TensorType::f32([4, 4]));
    b.result("y", b.matmul(x, b.transpose(w, &[1, 0])));
    let layer = b.finish().unwrap();
    let b = Builder::new("main");
    let x = b.param("x", TensorType::f32([2, 4]), Rate::Step);
    let y = b.call(&layer, "a", "a.", &[x])[0];
    b.result("y", b.call(&layer, "b", "b.", &[y])[0]);
    let module = Module { functions: vec![layer, b.finish().unwrap()], entries: vec!["main".into()] };
    let plan = support::plan(&module, Options::default(), Target::cpu());
    let layer = plan.functions.iter().find(|f| f.name == "main/layer").unwrap();
    let [weight] = &layer.weights[..] else { panic!("{:?}", layer.weights) };
    assert!(matches!(&weight.origin, WeightOrigin::Packed { tensors, .. } if tensors[0].key == "weight"));
    let args = support::arguments(&module, "main", 1);
    assert_eq!(Interpreter::new(&plan).run("main", &args), support::evaluate(&module, "main", &args));
}

#[test]
fn kernel_calls_say_what_they_cost_and_are_named() {
    let module = single("main", |b| {
        let x = b.param("x", TensorType::f32([3, 8]), Rate::Step);
        let w = b.weight("model", "w", TensorType::f32([5, 8]));
        b.result("y", b.name("proj.to_q", b.matmul_transposed(x, w)));
    });
    let plan = support::plan(&module, Options::default(), Target::cpu());
    let [Step::Kernel(call)] = &plan.functions[0].steps[..] else { panic!("{plan}") };
    assert_eq!((call.name.as_str(), call.flops, call.bytes), ("proj.to_q", 2 * 3 * 8 * 5, 4 * (24 + 40 + 15)));
}

#[track_caller]
fn refused(module: &Module, entry: &str, options: Options, target: Target) -> CompileError {
    builder(options, target).add("group", "program", module, entry).unwrap_err()
}

#[test]
fn what_does_not_exist_is_refused() {
    let module = single("main", |b| {
        let x = b.param("x", TensorType::f32([1000]), Rate::Step);
        b.result("y", b.add(x, b.weight("elsewhere", "w", TensorType::f32([1000]))));
    });
    let options = Options::default;
    let error = refused(&module, "other", options(), Target::cpu());
    assert_eq!(error, CompileError::UnknownEntry { name: "other".into() });
    let error = refused(&module, "main", options(), Target::cpu());
    assert!(matches!(error, CompileError::UnknownSource { .. }), "{error}");
    let error = refused(&module, "main", Options { disabled: vec!["fold".into()], ..options() }, Target::cpu());
    assert_eq!(
        error.to_string(),
        "there is no pass `fold`; the passes are expand, fuse-attention, fuse-group-norm, fuse-product, fuse-residual, fuse-rows, hoist, pack, pack-projections, simplify"
    );
}

#[test]
fn a_module_that_does_not_verify_is_refused() {
    let mut module = single("main", |b| {
        let x = b.param("x", TensorType::f32([2]), Rate::Step);
        b.result("y", b.neg(x));
    });
    module.functions[0].nodes[0].args.clear();
    let error = refused(&module, "main", Options::default(), Target::cpu());
    assert!(matches!(error, CompileError::Input { .. }), "{error}");
}

#[test]
fn limits_of_the_target_are_respected() {
    let module = single("main", |b| {
        let x = b.param("x", TensorType::f32([64, 64]), Rate::Step);
        b.result("y", b.matmul(x, b.silu(x)));
    });
    let error = refused(&module, "main", Options::default(), Target { max_arena_bytes: 1000, ..Target::cpu() });
    assert!(matches!(error, CompileError::BufferTooLarge { bytes: 16384, limit: 1000, .. }), "{error}");
    let error = refused(&module, "main", Options::default(), Target { max_bindings: 2, ..Target::cpu() });
    assert!(matches!(error, CompileError::TooManyBindings { found: 3, limit: 2, .. }), "{error}");
    let error = refused(&module, "main", Options::default(), Target { max_tensor_bytes: 16383, ..Target::cpu() });
    assert!(matches!(error, CompileError::TensorTooLarge { bytes: 16384, limit: 16383, .. }), "{error}");
}

/// Devices index with 32 bits: what has one row more than they count is two calls, the second at an offset.
#[test]
fn calls_beyond_32_bits_are_cut() {
    const ROW: usize = 1 << 16;
    const MOST: usize = (1 << 16) - 1;
    let calls = |rows: usize, target: Target| {
        let module = single("main", |b| {
            let x = b.param("x", TensorType::f32([rows, ROW]), Rate::Step);
            let w = b.weight("model", "w", TensorType::f32([8, ROW]));
            b.result("y", b.matmul_transposed(b.rms_norm(x, None, 1e-6), w));
        });
        let plan = support::plan(&module, Options::default(), target);
        let steps = plan.functions.iter().flat_map(|f| f.steps.clone());
        let calls = steps.map(|step| match step {
            Step::Kernel(call) => (call.work.name().to_string(), call.args[0].ty.shape[0], call.args[0].offset),
            Step::Call(_) => panic!("nothing is called"),
        });
        let mut calls: Vec<_> = calls.collect();
        // What is not at the start of its buffer counts from the first piece.
        let starts: Vec<u64> = calls.iter().map(|c| calls.iter().find(|d| d.0 == c.0).map_or(0, |d| d.2)).collect();
        calls.iter_mut().zip(starts).for_each(|(call, start)| call.2 -= start);
        calls
    };
    let named = |name: &str, rows, offset| (name.to_string(), rows, offset);
    let whole = [named("rms_norm", MOST, 0), named("matmul", MOST, 0)];
    assert_eq!(calls(MOST, Target::cuda()), whole);
    let after = |rows: usize| (4 * rows * ROW) as u64;
    // Results of 8 floats a row are bound at multiples of 512 bytes, which are 16 rows.
    let even = MOST / 16 * 16;
    let norms = [named("rms_norm", MOST, 0), named("rms_norm", 1, after(MOST))];
    let products = [named("matmul", even, 0), named("matmul", 16, after(even))];
    assert_eq!(calls(MOST + 1, Target::cuda()), [norms, products].concat());
    assert_eq!(calls(MOST + 1, Target::cpu()).len(), 2);
}

#[test]
fn tensors_that_cannot_be_cut_are_refused() {
    let module = single("main", |b| {
        let x = b.param("x", TensorType::new(DType::BF16, [1, 1 << 13, 1 << 10, 1 << 10]), Rate::Step);
        let [weight, bias] = ["w", "b"].map(|key| b.weight("model", key, TensorType::new(DType::BF16, [1 << 10])));
        b.result("y", b.group_norm(x, weight, bias, 32, 1e-6));
    });
    // 2^33 elements are fewer bytes than a device allows, but more than it counts.
    let error = refused(&module, "main", Options::default(), Target { max_tensor_bytes: 1 << 36, ..Target::cuda() });
    let words = error.to_string();
    for part in ["`group_norm`", "17179869184 bytes", "allows tensors of 8589803520", "compile a smaller size"] {
        assert!(words.contains(part), "`{part}` is not in: {words}");
    }
}

#[test]
fn groups_bind_no_more_than_the_target_does() {
    let module = single("main", |b| {
        let params: Vec<_> = (0..20).map(|i| b.param(&format!("x{i}"), TensorType::f32([1, 8]), Rate::Step)).collect();
        params.iter().enumerate().for_each(|(i, &x)| b.result(&format!("y{i}"), b.silu(x)));
    });
    let most = |target: Target| {
        let plan = support::plan(&module, Options::default(), target);
        let calls = plan.functions.iter().flat_map(|f| &f.steps).map(|step| match step {
            Step::Kernel(call) => call.args.len() + call.results.len(),
            Step::Call(_) => 0,
        });
        calls.max().unwrap()
    };
    assert_eq!(most(Target::cpu()), 40);
    assert_eq!(most(Target { max_bindings: 9, ..Target::cpu() }), 8);
}

#[test]
fn a_program_is_added_once() {
    let module = transformer(1);
    let mut plan = builder(Options::default(), Target::cpu());
    plan.add("group", "main", &module, "main").unwrap();
    let error = plan.add("group", "main", &module, "main").unwrap_err();
    assert_eq!(error, CompileError::DuplicateProgram { name: "main.generation".into() });
}
