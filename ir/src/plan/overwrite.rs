//! Whether a function may write a result over one of its parameters: state that a program updates, such as keys and
//! values of earlier tokens, then needs neither memory twice nor a copy.

use super::{Operand, Place, PlanFunction, Step};

/// Whether number `result` of the results of `function` may lie exactly on number `param` of its parameters: nothing reads
/// the parameter once the result is written, and what reads it to write the result may do so in place.
///
/// `function` and its callees must have been verified: callees stand before their callers. Numbers that do not exist give
/// `false`.
pub fn may_overwrite(functions: &[PlanFunction], function: u32, param: u32, result: u32) -> bool {
    let Some(f) = functions.get(function as usize) else { return false };
    let (Some(param_ty), Some(result_ty)) = (f.params.get(param as usize), f.results.get(result as usize)) else {
        return false;
    };
    let mut is_written = false;
    param_ty == result_ty
        && f.steps.iter().all(|step| {
            let (args, results) = match step {
                Step::Kernel(call) => (&call.args, &call.results),
                Step::Call(call) => (&call.args, &call.results),
            };
            let read = places(args, Place::Param(param));
            let written = places(results, Place::Result(result));
            let allowed = match (&read[..], &written[..]) {
                ([], _) => true,
                (_, []) => !is_written,
                // One operand and one result, so that nested calls are followed once each.
                (&[(j, from)], &[(k, to)]) => {
                    let is_same_place = from.offset == to.offset && from.ty == to.ty;
                    let fits = match step {
                        Step::Kernel(call) => call.work.may_overwrite(j, k),
                        Step::Call(call) => may_overwrite(functions, call.function, j as u32, k as u32),
                    };
                    !is_written && is_same_place && fits
                }
                _ => false,
            };
            is_written |= !written.is_empty();
            allowed
        })
}

/// Those of `operands` that lie in `place`, with their numbers.
fn places(operands: &[Operand], place: Place) -> Vec<(usize, &Operand)> {
    operands.iter().enumerate().filter(|(_, operand)| operand.place == place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Update;
    use crate::plan::{FunctionCall, Kernel, KernelCall, Storage};
    use crate::types::TensorType;

    fn cache() -> TensorType {
        TensorType::f32([1, 8, 2])
    }

    fn operand(place: Place, ty: TensorType) -> Operand {
        Operand { place, offset: 0, ty, storage: Storage::Native }
    }

    /// Writes a row, parameter 1, into the cache `base` and gives `to`.
    fn update(base: Place, to: Place) -> Step {
        let args = [(base, cache()), (Place::Param(1), TensorType::f32([1, 1, 2])), (Place::Param(2), row())];
        Step::Kernel(KernelCall {
            work: Kernel::Update(Update { axis: 1 }).into(),
            args: args.map(|(place, ty)| operand(place, ty)).into(),
            results: vec![operand(to, cache())],
            bytes: 0,
            flops: 0,
            name: String::new(),
        })
    }

    fn call(function: u32, base: Place, to: Place) -> Step {
        let args = [(base, cache()), (Place::Param(1), TensorType::f32([1, 1, 2])), (Place::Param(2), row())];
        Step::Call(FunctionCall {
            function,
            prefix: String::new(),
            name: String::new(),
            frame: vec![0],
            args: args.map(|(place, ty)| operand(place, ty)).into(),
            results: vec![operand(to, cache())],
        })
    }

    fn row() -> TensorType {
        TensorType::i32([])
    }

    fn function(steps: Vec<Step>) -> PlanFunction {
        PlanFunction {
            name: String::new(),
            params: vec![cache(), TensorType::f32([1, 1, 2]), row()],
            results: vec![cache()],
            weights: Vec::new(),
            constants: Vec::new(),
            frame_bytes: vec![1024],
            steps,
        }
    }

    #[track_caller]
    fn check(functions: &[Vec<Step>], expected: bool) {
        let functions: Vec<PlanFunction> = functions.iter().cloned().map(function).collect();
        assert_eq!(may_overwrite(&functions, functions.len() as u32 - 1, 0, 0), expected);
    }

    const CACHE: Place = Place::Param(0);
    const NEW: Place = Place::Result(0);
    const OTHER: Place = Place::Frame { arena: 0 };

    #[test]
    fn an_update_may_be_in_place_also_through_calls() {
        check(&[vec![update(CACHE, NEW)]], true);
        check(&[vec![update(CACHE, NEW)], vec![call(0, CACHE, NEW)]], true);
        check(&[vec![update(CACHE, OTHER), update(CACHE, NEW)]], true);
        check(&[vec![update(NEW, OTHER)]], true);
    }

    #[test]
    fn what_is_read_later_or_at_another_place_may_not() {
        check(&[vec![update(CACHE, NEW), update(CACHE, OTHER)]], false);
        check(&[vec![update(CACHE, NEW), update(CACHE, OTHER)], vec![call(0, CACHE, NEW)]], false);
        check(&[vec![update(CACHE, NEW)], vec![call(0, CACHE, NEW), call(0, CACHE, OTHER)]], false);
        let mut moved = update(CACHE, NEW);
        let Step::Kernel(kernel) = &mut moved else { return };
        kernel.args[0].offset = 4;
        check(&[vec![moved]], false);
        assert!(!may_overwrite(&[function(vec![update(CACHE, NEW)])], 0, 1, 0), "another type");
        assert!(!may_overwrite(&[function(vec![update(CACHE, NEW)])], 0, 3, 0), "no such parameter");
        assert!(!may_overwrite(&[], 0, 0, 0));
    }
}
