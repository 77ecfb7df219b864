//! Functions of repeated blocks, each kept once however often it is called.

use std::cell::RefCell;

use ltxc_ir::{BuildError, Builder, Function, Rate, ValueId};

use crate::Weights;

/// Functions that differ in more than their name.
///
/// Every call writes the function of its block anew and compares: blocks share a function exactly if they agree in
/// extents, switches and the stored types of their weights. So nothing has to predict what a block depends on.
pub(crate) struct SharedFunctions {
    base: &'static str,
    functions: RefCell<Vec<Function>>,
    error: RefCell<Option<BuildError>>,
}

impl SharedFunctions {
    /// No functions yet; they will be called `base.0`, `base.1`, …
    pub fn new(base: &'static str) -> SharedFunctions {
        SharedFunctions { base, functions: RefCell::default(), error: RefCell::default() }
    }

    /// Calls, under the name path `key`, the function that `body` writes for the weights below `key`.
    ///
    /// `args`: names of the parameters and the values passed for them, at least one. `body` gets the builder of the
    /// function, its weights and its parameters, and returns the result.
    pub fn call(
        &self,
        b: &Builder,
        weights: &Weights<'_>,
        key: &str,
        args: &[(&str, ValueId)],
        body: impl FnOnce(&Builder, &Weights<'_>, &[ValueId]) -> ValueId,
    ) -> ValueId {
        let prefix = format!("{key}.");
        let inner = Builder::new(self.base);
        let params: Vec<ValueId> =
            args.iter().map(|&(name, value)| inner.param(name, b.ty(value), Rate::Step)).collect();
        let result = body(&inner, &weights.repeated(std::slice::from_ref(&prefix)), &params);
        inner.result("y", result);
        let function = match inner.finish() {
            Ok(function) => function,
            Err(e) => {
                self.error.borrow_mut().get_or_insert(e);
                return args[0].1;
            }
        };
        let mut functions = self.functions.borrow_mut();
        let known = functions.iter().position(|f| *f == Function { name: f.name.clone(), ..function.clone() });
        let index = known.unwrap_or_else(|| {
            let name = format!("{}.{}", self.base, functions.len());
            functions.push(Function { name, ..function });
            functions.len() - 1
        });
        let values: Vec<ValueId> = args.iter().map(|&(_, value)| value).collect();
        let results = b.call(&functions[index], key, &weights.call_prefix(&prefix), &values);
        b.name(key, results[0])
    }

    /// The functions, in the order of their first call.
    ///
    /// # Errors
    /// The first one that could not be written.
    pub fn finish(self) -> Result<Vec<Function>, BuildError> {
        self.error.into_inner().map_or(Ok(self.functions.into_inner()), Err)
    }
}
