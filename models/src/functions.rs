//! Functions of repeated blocks, each kept once however often it is called.
//!
//! A block is written anew for every call and compared with what there is: calls share a function exactly if they agree
//! in extents, switches and the stored types of their weights. So nothing has to predict what a block depends on.

use std::cell::RefCell;

use ltxc_ir::{BuildError, Builder, Function, Module, Rate, ValueId};

use crate::Weights;

/// The callees of a module under construction.
///
/// Like [`Builder`], it keeps the first error until the end, so that model code needs no error handling between blocks.
#[derive(Default)]
pub struct Functions {
    list: RefCell<Vec<Function>>,
    error: RefCell<Option<BuildError>>,
}

/// What a call of a block is known by.
#[derive(Clone, Debug)]
pub struct Block<'a> {
    /// Name of the function. Functions of one name that differ get a number behind it.
    pub function: &'a str,
    /// Name path of the call, below the scope of the caller. Names inside of the block stand below it.
    pub name: &'a str,
    /// What the keys of its weights start with, below the caller's weights.
    pub prefix: String,
}

impl<'a> Block<'a> {
    /// The block whose name and weights are those of the module `key`.
    pub fn at(function: &'a str, key: &'a str) -> Block<'a> {
        Block { function, name: key, prefix: format!("{key}.") }
    }
}

impl Functions {
    /// Calls a block with several results.
    ///
    /// - `args`: names of the parameters and the values passed for them.
    /// - `body` writes the function: it gets its builder, weights and parameters, and returns its results by name.
    /// - Returns the results; where the block could not be written, values that stand for them.
    pub fn call<N: AsRef<str>>(
        &self,
        b: &Builder,
        weights: &Weights<'_>,
        block: Block<'_>,
        args: &[(N, ValueId)],
        body: impl FnOnce(&Builder, &Weights<'_>, &[ValueId]) -> Vec<(&'static str, ValueId)>,
    ) -> Vec<ValueId> {
        let inner = Builder::new(block.function);
        let params: Vec<ValueId> =
            args.iter().map(|(name, value)| inner.param(name.as_ref(), b.ty(*value), Rate::Step)).collect();
        let results = body(&inner, &weights.repeated(&block.prefix), &params);
        results.iter().for_each(|&(name, value)| inner.result(name, value));
        let placeholders = || results.iter().map(|_| b.scalar(0.0)).collect();
        let index = match inner.finish() {
            Ok(function) => self.share(function),
            Err(e) => {
                self.error.borrow_mut().get_or_insert(e);
                return placeholders();
            }
        };
        let values: Vec<ValueId> = args.iter().map(|&(_, value)| value).collect();
        b.call(&self.list.borrow()[index], block.name, &weights.call_prefix(&block.prefix), &values)
    }

    /// Calls a block with one result, which gets the name of the block.
    pub fn call_one<N: AsRef<str>>(
        &self,
        b: &Builder,
        weights: &Weights<'_>,
        block: Block<'_>,
        args: &[(N, ValueId)],
        body: impl FnOnce(&Builder, &Weights<'_>, &[ValueId]) -> ValueId,
    ) -> ValueId {
        let name = block.name;
        let results = self.call(b, weights, block, args, |b, w, params| vec![("output", body(b, w, params))]);
        b.name(name, results[0])
    }

    /// Number of the function that equals `function` but for its name; it is added if there is none.
    fn share(&self, mut function: Function) -> usize {
        let mut list = self.list.borrow_mut();
        let base = function.name.clone();
        let mut copies = 0;
        for (i, other) in list.iter().enumerate() {
            let number = other.name.strip_prefix(&base);
            let is_copy = number.is_some_and(|n| n.is_empty() || n.strip_prefix('_').is_some_and(is_number));
            if is_copy {
                copies += 1;
                function.name.clone_from(&other.name);
                if function == *other {
                    return i;
                }
            }
        }
        function.name = if copies == 0 { base } else { format!("{base}_{}", copies + 1) };
        list.push(function);
        list.len() - 1
    }

    /// The module of these functions and `entry`, which calls them.
    ///
    /// # Errors
    /// The first block that could not be written.
    pub fn into_module(self, entry: Function) -> Result<Module, BuildError> {
        if let Some(error) = self.error.into_inner() {
            return Err(error);
        }
        let entries = vec![entry.name.clone()];
        let mut functions = self.list.into_inner();
        functions.push(entry);
        Ok(Module { functions, entries })
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use ltxc_ir::verify::verify;
    use ltxc_ir::{DType, TensorType};

    use super::*;
    use crate::TensorDirectory;

    /// Blocks of different widths and dtypes; block `i` has the width in its name.
    struct Stored;

    impl TensorDirectory for Stored {
        fn tensor_type(&self, key: &str) -> Option<TensorType> {
            let dtype = if key.starts_with("outer.1.") { DType::BF16 } else { DType::F32 };
            key.ends_with(".weight").then(|| TensorType::new(dtype, [2]))
        }
    }

    #[test]
    fn equal_blocks_share_a_function_and_nested_ones_come_first() {
        let (functions, weights) = (Functions::default(), Weights::new("model", &Stored));
        let b = Builder::new("main");
        let mut x = b.param("x", TensorType::f32([2]), Rate::Step);
        for key in ["outer.0", "outer.1", "outer.2"] {
            x = functions.call_one(&b, &weights, Block::at("outer", key), &[("x", x)], |b, w, params| {
                let inner = |key: &str, x: ValueId| {
                    let body = |b: &Builder, w: &Weights<'_>, p: &[ValueId]| b.add(p[0], w.get(b, "weight", &[2]));
                    functions.call_one(b, w, Block::at("inner", key), &[("x", x)], body)
                };
                inner("second", inner("first", params[0]))
            });
        }
        b.result("y", x);
        weights.finish().expect("every weight is there");
        let module = functions.into_module(b.finish().expect("well typed")).expect("every block was written");
        verify(&module).expect("callees come first");
        let names: Vec<&str> = module.functions.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["inner", "outer", "inner_2", "outer_2", "main"]);
    }

    #[test]
    fn a_block_that_does_not_fit_is_an_error_in_the_end() {
        let (functions, weights) = (Functions::default(), Weights::new("model", &Stored));
        let b = Builder::new("main");
        let x = b.param("x", TensorType::f32([2]), Rate::Step);
        let body = |b: &Builder, _: &Weights<'_>, p: &[ValueId]| b.matmul(p[0], p[0]);
        b.result("y", functions.call_one(&b, &weights, Block::at("bad", "key"), &[("x", x)], body));
        let error = functions.into_module(b.finish().expect("the caller fits")).expect_err("the block does not");
        assert_eq!((error.function.as_str(), error.op.as_str()), ("bad", "matmul"));
    }
}
