//! The verifier: says everything that is wrong with a module, each problem with the line it is about.
//!
//! Checked, for every function:
//! - its name is unique; parameters define the first values, nodes the rest, each value exactly once and in order;
//! - operands are defined before they are used; no type is too large;
//! - every node has the result type that its op infers; no attribute is NaN;
//! - a `call` names an earlier function and has its parameter and result types;
//! - results exist.
//!
//! For the module: entries name existing functions once, and the parameters and results of an entry have distinct names.

use std::collections::BTreeMap;
use std::fmt;

use crate::graph::{Function, Module, Node};
use crate::ops::Op;
use crate::text::node_text;
use crate::types::TensorType;

/// Everything that is wrong with a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyError {
    /// One line or two per problem.
    pub problems: Vec<String>,
}

impl fmt::Display for VerifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST: usize = 20;
        write!(f, "{} problem(s) in the graph", self.problems.len())?;
        self.problems.iter().take(MOST).try_for_each(|p| write!(f, "\n  {p}"))?;
        match self.problems.len().checked_sub(MOST) {
            Some(more) if more > 0 => write!(f, "\n  … and {more} more"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for VerifyError {}

/// Checks a module.
///
/// # Errors
/// All problems found. Problems that follow from an earlier one of the same node are left out.
pub fn verify(module: &Module) -> Result<(), VerifyError> {
    let mut problems = Vec::new();
    let mut earlier: BTreeMap<&str, &Function> = BTreeMap::new();
    for function in &module.functions {
        if earlier.contains_key(function.name.as_str()) {
            problems.push(format!("function `{}` is defined twice", function.name));
        }
        FunctionCheck { function, earlier: &earlier, problems: &mut problems }.run();
        earlier.insert(&function.name, function);
    }
    for (i, entry) in module.entries.iter().enumerate() {
        match earlier.get(entry.as_str()) {
            None => problems.push(format!("entry `{entry}` is not a function")),
            Some(_) if module.entries[..i].contains(entry) => problems.push(format!("entry `{entry}` is named twice")),
            Some(function) => check_entry(function, &mut problems),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(VerifyError { problems }) }
}

fn check_entry(function: &Function, problems: &mut Vec<String>) {
    let params = function.params.iter().filter_map(|p| function.values.get(p.value.index())).map(|v| v.name.as_str());
    let results = function.results.iter().map(|r| r.name.as_str());
    for (what, mut names) in [("parameter", params.collect::<Vec<_>>()), ("result", results.collect())] {
        names.sort_unstable();
        if names.first() == Some(&"") {
            problems.push(format!("entry `{}` has a {what} without a name", function.name));
        }
        for pair in names.windows(2).filter(|w| w[0] == w[1] && !w[0].is_empty()) {
            problems.push(format!("entry `{}` has two {what}s called `{}`", function.name, pair[0]));
        }
    }
}

struct FunctionCheck<'a> {
    function: &'a Function,
    earlier: &'a BTreeMap<&'a str, &'a Function>,
    problems: &'a mut Vec<String>,
}

impl FunctionCheck<'_> {
    fn run(mut self) {
        let f = self.function;
        let mut defined = 0usize;
        for p in &f.params {
            if p.value.index() != defined || defined >= f.values.len() {
                self.problem(None, format!("parameter {} is not value {defined}", p.value));
                return;
            }
            defined += 1;
        }
        for (i, value) in f.values.iter().enumerate() {
            if value.ty.checked_bytes().is_none() {
                self.problem(None, format!("%{i} has type {}, which is too large", value.ty));
            }
        }
        for node in &f.nodes {
            let in_order = node.results.iter().enumerate().all(|(i, r)| r.index() == defined + i);
            if !in_order || defined + node.results.len() > f.values.len() {
                self.problem(Some(node), format!("results must be the next values, starting with %{defined}"));
                return;
            }
            match node.args.iter().find(|a| a.index() >= defined) {
                Some(early) => self.problem(Some(node), format!("{early} is used before it is defined")),
                None => self.check_node(node),
            }
            defined += node.results.len();
        }
        if defined != f.values.len() {
            self.problem(None, format!("{} values are never defined", f.values.len() - defined));
        }
        for r in &f.results {
            if r.value.index() >= defined {
                self.problem(None, format!("result {} is not defined", r.value));
            }
        }
    }

    fn check_node(&mut self, node: &Node) {
        let args: Vec<&TensorType> = node.args.iter().map(|&a| self.function.ty(a)).collect();
        let found: Vec<&TensorType> = node.results.iter().map(|&r| self.function.ty(r)).collect();
        if has_nan(&node.op) {
            return self.problem(Some(node), "an attribute is not a number".into());
        }
        if let Op::Call(call) = &node.op {
            let Some(callee) = self.earlier.get(call.function.as_str()) else {
                return self.problem(Some(node), format!("`{}` is not an earlier function", call.function));
            };
            let named = callee.params.iter().map(|p| p.value).chain(callee.results.iter().map(|r| r.value));
            if named.into_iter().any(|v| v.index() >= callee.values.len()) {
                // The callee is broken, which is a problem of its own; it has no types to compare with.
                return;
            }
            let (params, results) = (callee.param_types(), callee.result_types());
            if !params.iter().eq(args.iter().copied()) {
                return self.problem(Some(node), format!("`{}` takes {params:?}, found {args:?}", call.function));
            }
            if !results.iter().eq(found.iter().copied()) {
                self.problem(Some(node), format!("`{}` gives {results:?}, found {found:?}", call.function));
            }
            return;
        }
        match node.op.infer(&args) {
            Err(problem) => self.problem(Some(node), problem),
            Ok(ty) if found != [&ty] => self.problem(Some(node), format!("the result is {ty}, found {found:?}")),
            Ok(_) => {}
        }
    }

    fn problem(&mut self, node: Option<&Node>, text: String) {
        let place = match node {
            Some(node) => format!("{}\n        {text}", node_text(self.function, node)),
            None => text,
        };
        self.problems.push(format!("@{}: {place}", self.function.name));
    }
}

/// JSON has no NaN: an attribute that is not a number prints as `null`.
fn has_nan(op: &Op) -> bool {
    fn any_null(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::Null => true,
            serde_json::Value::Array(items) => items.iter().any(any_null),
            serde_json::Value::Object(map) => map.values().any(any_null),
            _ => false,
        }
    }
    // Constants check their values in their type rule, and may be large.
    !matches!(op, Op::Const(_)) && any_null(&op.attributes())
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::text::parse;

    #[track_caller]
    fn check(text: &str, want: Expect) {
        let found = match verify(&parse(text).unwrap()) {
            Ok(()) => "ok".to_string(),
            Err(e) => e.to_string(),
        };
        want.assert_eq(&found);
    }

    #[test]
    fn accepts_a_call_of_an_earlier_function() {
        let text = "fn @f(%0: f32[2]) {\n%1 = neg %0 : f32[2]\nreturn %1 \"y\"\n}\n\
                    fn @g(%0: f32[2] \"x\") {\n%1 = call %0 {\"function\":\"f\",\"prefix\":\"\"} : f32[2]\nreturn %1 \"y\"\n}\nentry @g";
        check(text, expect!["ok"]);
    }

    #[test]
    fn collects_all_problems() {
        let text = "fn @f(%0: f32[2] \"x\") {\n%1 = add %0, %3 : f32[2]\n%2 = neg %0 : f32[3]\n%3 = mul %0, %2 : f32[2]\n\
                    return %3\n}\nentry @f\nentry @g";
        check(
            text,
            expect![[r#"
                5 problem(s) in the graph
                  @f: %1 = add %0, %3 : f32[2]
                        %3 is used before it is defined
                  @f: %2 = neg %0 : f32[3]
                        the result is f32[2], found [f32[3]]
                  @f: %3 = mul %0, %2 : f32[2]
                        f32[3] does not broadcast to [2]
                  entry `f` has a result without a name
                  entry `g` is not a function"#]],
        );
    }

    #[test]
    fn a_call_of_a_broken_function_is_no_second_problem() {
        let text = "fn @f(%0: f32[2]) {\nreturn %1\n}\n\
                    fn @g(%0: f32[2]) {\n%1 = call %0 {\"function\":\"f\",\"prefix\":\"\"} : f32[2]\nreturn %1\n}";
        check(
            text,
            expect![[r#"
                1 problem(s) in the graph
                  @f: result %1 is not defined"#]],
        );
    }

    #[test]
    fn refuses_types_that_overflow() {
        let n = usize::MAX / 2;
        check(
            &format!("fn @f(%0: f32[{n},4]) {{\nreturn %0\n}}"),
            expect![[r#"
                1 problem(s) in the graph
                  @f: %0 has type f32[9223372036854775807,4], which is too large"#]],
        );
    }
}
