//! Writing a function anew from an old one: what every pass does.

use ltxc_ir::{Function, Node, Op, Param, ValueId};

/// A function in the making, with the new value of every value that was taken over from `source`.
pub(crate) struct Rebuild<'a> {
    source: &'a Function,
    map: Vec<Option<ValueId>>,
    /// What has been written so far.
    pub out: Function,
}

impl<'a> Rebuild<'a> {
    /// Starts the function `name`.
    pub fn new(source: &'a Function, name: &str) -> Rebuild<'a> {
        let out = Function { name: name.into(), ..Function::default() };
        Rebuild { source, map: vec![None; source.values.len()], out }
    }

    /// The new value of `old`, if it was taken over.
    pub fn find(&self, old: ValueId) -> Option<ValueId> {
        self.map[old.index()]
    }

    /// The new value of `old`.
    pub fn get(&self, old: ValueId) -> ValueId {
        // Passes go through nodes in order, and a verified function defines operands before their use.
        self.find(old).expect("operands are taken over before their users")
    }

    /// Says which new value stands for `old`.
    pub fn set(&mut self, old: ValueId, new: ValueId) {
        self.map[old.index()] = Some(new);
    }

    /// Takes over a parameter.
    pub fn param(&mut self, param: &Param) {
        let info = &self.source.values[param.value.index()];
        let value = self.out.add_value(info.ty.clone(), info.name.clone());
        self.out.params.push(Param { value, rate: param.rate });
        self.set(param.value, value);
    }

    /// Takes over all parameters.
    pub fn params(&mut self) {
        let source = self.source;
        source.params.iter().for_each(|p| self.param(p));
    }

    /// Takes over a node with another op and other (new) operands.
    pub fn node_as(&mut self, node: &Node, op: Op, args: Vec<ValueId>) {
        let results = node
            .results
            .iter()
            .map(|&r| {
                let info = &self.source.values[r.index()];
                let new = self.out.add_value(info.ty.clone(), info.name.clone());
                self.set(r, new);
                new
            })
            .collect();
        self.out.nodes.push(Node { op, args, results });
    }

    /// Takes over a node as it is.
    pub fn node(&mut self, node: &Node) {
        let args = node.args.iter().map(|&a| self.get(a)).collect();
        self.node_as(node, node.op.clone(), args);
    }

    /// Takes over all results.
    pub fn results(&mut self) {
        let all = vec![true; self.source.results.len()];
        self.results_where(&all);
    }

    /// Takes over the results that are marked.
    pub fn results_where(&mut self, marks: &[bool]) {
        for (r, _) in self.source.results.iter().zip(marks).filter(|(_, marked)| **marked) {
            let mut result = r.clone();
            result.value = self.get(r.value);
            self.out.results.push(result);
        }
    }
}
