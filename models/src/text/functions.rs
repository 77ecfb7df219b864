//! Functions of one module, shared by everything that computes the same.

use ltxc_ir::{Function, Module};

/// The callees of a module under construction.
///
/// Repeated blocks are built one by one and offered here: equal ones become one function. Blocks that differ, be it in
/// the stored dtype of a weight, get functions of their own, so that no builder has to know which differences matter.
#[derive(Default)]
pub struct Functions {
    list: Vec<Function>,
}

impl Functions {
    /// The function of this set that equals `function` but for its name; `function` itself, under a name of its own, if
    /// there is none.
    pub fn share(&mut self, mut function: Function) -> &Function {
        let name = function.name.clone();
        let mut copies = 0;
        let mut found = None;
        for (i, other) in self.list.iter().enumerate() {
            let is_copy =
                other.name == name || other.name.strip_prefix(&name).is_some_and(|rest| rest.starts_with('_'));
            if is_copy {
                copies += 1;
                function.name.clone_from(&other.name);
                if function == *other {
                    found = Some(i);
                    break;
                }
            }
        }
        let index = found.unwrap_or_else(|| {
            function.name = if copies == 0 { name } else { format!("{name}_{}", copies + 1) };
            self.list.push(function);
            self.list.len() - 1
        });
        &self.list[index]
    }

    /// The module of these functions and `entry`, which calls them.
    pub fn into_module(self, entry: Function) -> Module {
        let entries = vec![entry.name.clone()];
        let mut functions = self.list;
        functions.push(entry);
        Module { functions, entries }
    }
}

#[cfg(test)]
mod tests {
    use ltxc_ir::{Builder, Rate, TensorType};

    use super::*;

    fn double(name: &str, width: usize) -> Function {
        let b = Builder::new(name);
        let x = b.param("x", TensorType::f32([width]), Rate::Step);
        b.result("y", b.add(x, x));
        b.finish().expect("well typed")
    }

    #[test]
    fn equal_functions_are_shared_and_others_get_their_own_name() {
        let mut functions = Functions::default();
        assert_eq!(functions.share(double("block", 2)).name, "block");
        assert_eq!(functions.share(double("block", 3)).name, "block_2");
        assert_eq!(functions.share(double("block", 2)).name, "block");
        assert_eq!(functions.share(double("block", 3)).name, "block_2");
        assert_eq!(functions.share(double("block", 4)).name, "block_3");
        assert_eq!(functions.list.len(), 3);
    }
}
