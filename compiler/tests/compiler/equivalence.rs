//! Every pass, and the whole compiler, keep what random modules compute.

use crate::support::{arguments, assert_close, evaluate, evaluate_split, interpret, plan, random};
use ltxc_compiler::{Fuse, Options, optimize, passes};
use ltxc_ir::plan::{Plan, Target};
use ltxc_ir::verify::verify;
use ltxc_ir::{Builder, Module, Op, Rate, TensorType};

const SEEDS: u64 = 150;

fn options(fuse: Fuse) -> Options {
    Options { fuse, verify: true, passes_per_evaluation: 2, packs_projections: Some(true), ..Options::default() }
}

#[test]
fn every_pass_keeps_values_exactly() {
    for seed in 0..SEEDS {
        let module = random::module(seed, seed % 2 == 0);
        verify(&module).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let args = arguments(&module, "main", seed);
        let expected = evaluate(&module, "main", &args);
        for fuse in [Fuse::None, Fuse::Composite, Fuse::Full] {
            let options = options(fuse);
            let mut now = module.clone();
            for pass in passes() {
                now = (pass.run)(&now, &options);
                verify(&now).unwrap_or_else(|e| panic!("seed {seed}, {}: {e}\n{now}", pass.name));
                let found = evaluate_split(&now, &args);
                assert_close(&found, &expected, 0.0, &format!("seed {seed}, pass {}", pass.name));
            }
        }
    }
}

#[test]
fn passes_reach_the_same_module_again() {
    for seed in 0..SEEDS {
        let module = random::module(seed, true);
        let options = options(Fuse::Full);
        assert_eq!(optimize(&module, &options), optimize(&module, &options), "seed {seed}");
    }
}

#[test]
fn plans_compute_what_the_graph_means() {
    for seed in 0..SEEDS {
        let narrow = seed % 3 == 0;
        let module = random::module(seed, narrow);
        let args = arguments(&module, "main", seed);
        let expected = evaluate(&module, "main", &args);
        // Maps round narrow results once, the evaluator after every step: a bf16 has 8 bits, and norms magnify.
        let limit = if narrow { 0.03 } else { 0.0 };
        for fuse in [Fuse::None, Fuse::Composite, Fuse::Full] {
            let plan = plan(&module, options(fuse), Target::cpu());
            assert_close(&interpret(&plan, &args), &expected, limit, &format!("seed {seed}, {fuse:?}"));
        }
    }
}

#[test]
fn every_pass_can_be_left_out() {
    for seed in 0..SEEDS / 3 {
        let module = random::module(seed, false);
        let args = arguments(&module, "main", seed);
        let expected = evaluate(&module, "main", &args);
        let fusing = ["fuse-attention", "fuse-product", "fuse-group-norm", "fuse-rows"];
        let others = ["simplify", "hoist", "pack", "pack-projections", "fuse-residual"];
        let each = others.into_iter().chain(fusing).map(|p| vec![p]);
        for disabled in each.chain([vec!["simplify", "hoist", "pack"], fusing.to_vec()]) {
            let disabled: Vec<String> = disabled.into_iter().map(String::from).collect();
            let options = Options { disabled: disabled.clone(), ..options(Fuse::Full) };
            let plan = plan(&module, options, Target::cpu());
            assert_close(&interpret(&plan, &args), &expected, 0.0, &format!("seed {seed}, without {disabled:?}"));
        }
    }
}

#[test]
fn hoisting_respects_every_budget() {
    for seed in 0..SEEDS / 3 {
        let module = random::module(seed, false);
        let args = arguments(&module, "main", seed);
        let expected = evaluate(&module, "main", &args);
        for budget in [0, 64, 256, 1024] {
            let options = Options { hoist_budget_bytes: budget, ..options(Fuse::Full) };
            let found = evaluate_split(&optimize(&module, &options).unwrap(), &args);
            assert_close(&found, &expected, 0.0, &format!("seed {seed}, budget {budget}"));
            let plan = plan(&module, options, Target::cpu());
            assert_close(&interpret(&plan, &args), &expected, 0.0, &format!("seed {seed}, budget {budget}"));
            let kept = &optimize(&module, &Options { hoist_budget_bytes: budget, ..Options::default() }).unwrap();
            let crossing = kept.entries.iter().filter(|e| *e != "main").map(|e| kept.function(e).unwrap());
            let bytes: usize = crossing.flat_map(|f| f.result_types()).map(|t| t.bytes()).sum();
            assert!(bytes as u64 <= budget, "seed {seed}: {bytes} bytes of {budget}");
        }
    }
}

#[test]
fn plans_with_small_arenas_compute_the_same() {
    for seed in 0..SEEDS / 3 {
        let module = random::module(seed, false);
        let args = arguments(&module, "main", seed);
        let expected = evaluate(&module, "main", &args);
        let target = Target { max_arena_bytes: 2048, ..Target::cpu() };
        let plan = plan(&module, options(Fuse::Full), target);
        assert!(plan.arena_bytes().iter().all(|&b| b <= 2048));
        assert_close(&interpret(&plan, &args), &expected, 0.0, &format!("seed {seed}"));
    }
}

#[test]
fn the_same_module_gives_the_same_plan() {
    for seed in 0..SEEDS / 3 {
        let module = random::module(seed, true);
        let [a, b] = [0, 1].map(|_| plan(&module, options(Fuse::Full), Target::cpu()));
        assert_eq!(a, b, "seed {seed}");
    }
}

#[test]
fn joined_projections_give_the_same_parts() {
    for (tokens, widths, has_bias) in [(1, vec![1, 7], true), (5, vec![3, 3, 1], false), (2, vec![8, 2, 5], true)] {
        let b = Builder::new("main");
        let x = b.param("x", TensorType::f32([1, tokens, 6]), Rate::Step);
        for (i, &n) in widths.iter().enumerate() {
            let y = b.matmul_transposed(x, b.weight("model", &format!("{i}.weight"), TensorType::f32([n, 6])));
            let y = if has_bias { b.add(y, b.weight("model", &format!("{i}.bias"), TensorType::f32([n]))) } else { y };
            b.result(&format!("y{i}"), y);
        }
        let module = Module { functions: vec![b.finish().unwrap()], entries: vec!["main".into()] };
        let joined = optimize(&module, &options(Fuse::Composite)).unwrap();
        let is_product = |n: &&ltxc_ir::Node| matches!(n.op, Op::Matmul(_));
        let main = joined.function("main").unwrap();
        assert_eq!(main.nodes.iter().filter(is_product).count(), 1, "{joined}");
        let args = arguments(&module, "main", 7);
        let expected = evaluate(&module, "main", &args);
        for fuse in [Fuse::None, Fuse::Composite, Fuse::Full] {
            let plan = plan(&module, options(fuse), Target::cpu());
            assert_close(&interpret(&plan, &args), &expected, 0.0, &format!("{widths:?}, {fuse:?}"));
        }
    }
}

#[test]
fn calls_that_are_cut_by_rows_compute_the_same() {
    let b = Builder::new("main");
    let x = b.param("x", TensorType::f32([1, 37, 16]), Rate::Step);
    let [w, bias] = [vec![16, 16], vec![16]].map(TensorType::f32);
    let normed = b.mul(b.rms_norm(x, None, 1e-6), b.weight("model", "scale", bias.clone()));
    let product = b.add(b.matmul_transposed(normed, b.weight("model", "w", w)), b.weight("model", "bias", bias));
    b.result("y", b.add(x, b.gelu(product)));
    let module = Module { functions: vec![b.finish().unwrap()], entries: vec!["main".into()] };
    let args = arguments(&module, "main", 1);
    let expected = evaluate(&module, "main", &args);
    let steps = |plan: &Plan| plan.functions.iter().map(|f| f.steps.len()).sum::<usize>();
    for fuse in [Fuse::None, Fuse::Composite, Fuse::Full] {
        let whole = plan(&module, options(fuse), Target::cpu());
        // The weight has 1024 bytes, a row 64: pieces of 17 or 16 rows.
        for max_tensor_bytes in [1100, 1024] {
            let cut = plan(&module, options(fuse), Target { max_tensor_bytes, ..Target::cpu() });
            assert!(steps(&cut) >= steps(&whole) + 2, "{fuse:?}: {cut}");
            assert_close(&interpret(&cut, &args), &expected, 0.0, &format!("{fuse:?}, {max_tensor_bytes} bytes"));
        }
    }
}
