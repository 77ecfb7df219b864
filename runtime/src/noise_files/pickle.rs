//! The part of the pickle format that saved tensors need: dictionaries, lists, tuples, text, numbers, and three names.
//!
//! A pickle is a program for a stack machine, and in general it may call anything. This machine knows no calls: a name
//! becomes a [`Value::Name`], a call of one becomes a [`Value::Call`], and what they mean is decided by the reader of the
//! result, who knows tensors and nothing else. Unknown instructions end the reading.

use std::rc::Rc;

use super::Problem;

/// Most instructions, and deepest nesting: a file with one tensor has about fifty, four deep.
const MOST_STEPS: usize = 100_000;
const MOST_DEPTH: usize = 16;

/// What a pickle holds. Values are shared: a file may name one a thousand times.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// Nothing.
    None,
    /// True or false.
    Bool(bool),
    /// A number.
    Int(i64),
    /// A word.
    Text(Rc<str>),
    /// A tuple or a list.
    List(Rc<Vec<Value>>),
    /// A dictionary.
    Dict(Rc<Vec<(Value, Value)>>),
    /// Something of a module: `torch FloatStorage`.
    Name(Rc<str>),
    /// A call of a name.
    Call(Rc<str>, Rc<Vec<Value>>),
    /// Something that stands elsewhere in the archive.
    Reference(Rc<Vec<Value>>),
}

/// Names that a file of tensors may hold.
const NAMES: [&str; 9] = [
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch DoubleStorage",
    "torch LongStorage",
    "torch IntStorage",
    "torch.storage UntypedStorage",
];

/// Reads a pickle.
pub(super) fn parse(bytes: &[u8]) -> Result<Value, Problem> {
    let mut machine = Machine { rest: bytes, stack: Vec::new(), marks: Vec::new(), memo: Vec::new() };
    for _ in 0..MOST_STEPS {
        if let Some(value) = machine.step()? {
            return Ok(value);
        }
    }
    Err(format!("the pickle has more than {MOST_STEPS} instructions"))
}

/// A value on the stack, and how deep it is nested.
#[derive(Clone)]
struct Item {
    value: Value,
    depth: usize,
}

struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Item>,
    marks: Vec<usize>,
    memo: Vec<Option<Item>>,
}

impl<'a> Machine<'a> {
    /// Runs one instruction; gives the result at the end.
    fn step(&mut self) -> Result<Option<Value>, Problem> {
        let code = self.byte()?;
        match code {
            b'.' => return self.pop().map(|item| Some(item.value)),
            0x80 => drop(self.byte()?),  // protocol
            0x95 => drop(self.take(8)?), // frame
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::None, 0)?,
            0x88 => self.push(Value::Bool(true), 0)?,
            0x89 => self.push(Value::Bool(false), 0)?,
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()), 0)?;
            }
            b'K' => {
                let n = self.byte()?;
                self.push(Value::Int(n.into()), 0)?;
            }
            b'M' => {
                let n = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()), 0)?;
            }
            0x8a => self.long()?,
            b'X' => {
                let length = u32::from_le_bytes(self.array()?) as usize;
                self.text(length)?;
            }
            0x8c => {
                let length = self.byte()? as usize;
                self.text(length)?;
            }
            b')' | b']' => self.push(Value::List(Rc::default()), 1)?,
            b'}' => self.push(Value::Dict(Rc::default()), 1)?,
            0x85..=0x87 => {
                let count = (code - 0x84) as usize;
                let at = self.stack.len().checked_sub(count).ok_or("the pickle takes more than there is")?;
                self.list_from(at)?;
            }
            b't' | b'l' => {
                let at = self.mark()?;
                self.list_from(at)?;
            }
            b'a' => {
                let at = self.stack.len().checked_sub(1).ok_or("the pickle takes more than there is")?;
                self.append(at)?;
            }
            b'e' => {
                let at = self.mark()?;
                self.append(at)?;
            }
            b's' => {
                let at = self.stack.len().checked_sub(2).ok_or("the pickle takes more than there is")?;
                self.set(at)?;
            }
            b'u' => {
                let at = self.mark()?;
                self.set(at)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.name(&format!("{module} {name}"))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?.value, self.pop()?.value);
                let (Value::Text(name), Value::Text(module)) = (name, module) else {
                    return Err("the pickle names something by no text".into());
                };
                self.name(&format!("{module} {name}"))?;
            }
            b'R' => self.call()?,
            b'Q' => {
                let item = self.pop()?;
                let Value::List(parts) = item.value else { return Err("a storage is named by no tuple".into()) };
                self.push(Value::Reference(parts), item.depth)?;
            }
            b'q' => {
                let at = self.byte()? as usize;
                self.remember(at)?;
            }
            b'r' => {
                let at = u32::from_le_bytes(self.array()?) as usize;
                self.remember(at)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' => {
                let at = self.byte()? as usize;
                self.recall(at)?;
            }
            b'j' => {
                let at = u32::from_le_bytes(self.array()?) as usize;
                self.recall(at)?;
            }
            other => {
                return Err(format!("the pickle has instruction {other:#04x}, which files of tensors do not need"));
            }
        }
        Ok(None)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Problem> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or("the pickle is cut")?;
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Problem> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        self.take(N)?.try_into().map_err(|_| "the pickle is cut".into())
    }

    fn line(&mut self) -> Result<&'a str, Problem> {
        let end = self.rest.iter().position(|&b| b == b'\n').ok_or("the pickle is cut")?;
        let line = self.take(end + 1)?;
        std::str::from_utf8(&line[..end]).map_err(|_| "the pickle holds a name that is no text".into())
    }

    fn text(&mut self, length: usize) -> Result<(), Problem> {
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "the pickle holds text that is none")?;
        self.push(Value::Text(text.into()), 0)
    }

    fn long(&mut self) -> Result<(), Problem> {
        let length = self.byte()? as usize;
        let bytes = self.take(length)?;
        if length > 8 {
            return Err("the pickle holds a number of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..length].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)), 0)
    }

    fn name(&mut self, name: &str) -> Result<(), Problem> {
        if !NAMES.contains(&name) {
            let shown: String = name.chars().take(80).collect();
            return Err(format!("the pickle names `{shown}`; only tensors are read, nothing is executed"));
        }
        self.push(Value::Name(name.into()), 0)
    }

    fn push(&mut self, value: Value, depth: usize) -> Result<(), Problem> {
        if depth > MOST_DEPTH {
            return Err(format!("the pickle nests more than {MOST_DEPTH} values"));
        }
        self.stack.push(Item { value, depth });
        Ok(())
    }

    fn pop(&mut self) -> Result<Item, Problem> {
        // Nothing below a mark may be taken one by one.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle takes more than there is".into());
        }
        self.stack.pop().ok_or_else(|| "the pickle takes more than there is".into())
    }

    fn mark(&mut self) -> Result<usize, Problem> {
        let at = self.marks.pop().ok_or("the pickle closes what it has not opened")?;
        if at > self.stack.len() { Err("the pickle takes more than there is".into()) } else { Ok(at) }
    }

    /// The items from `at` on, and the depth of something that holds them.
    fn items(&mut self, at: usize) -> (Vec<Value>, usize) {
        let items = self.stack.split_off(at);
        let depth = 1 + items.iter().map(|i| i.depth).max().unwrap_or(0);
        (items.into_iter().map(|i| i.value).collect(), depth)
    }

    fn list_from(&mut self, at: usize) -> Result<(), Problem> {
        let (values, depth) = self.items(at);
        self.push(Value::List(Rc::new(values)), depth)
    }

    fn append(&mut self, at: usize) -> Result<(), Problem> {
        let (values, depth) = self.items(at);
        let mut item = self.pop()?;
        let Value::List(list) = &mut item.value else { return Err("the pickle appends to no list".into()) };
        Rc::make_mut(list).extend(values);
        self.push(item.value, item.depth.max(depth))
    }

    fn set(&mut self, at: usize) -> Result<(), Problem> {
        let (values, depth) = self.items(at);
        let mut item = self.pop()?;
        let Value::Dict(dict) = &mut item.value else { return Err("the pickle sets an entry of no dictionary".into()) };
        let (pairs, rest) = values.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("the pickle has a key without a value".into());
        }
        Rc::make_mut(dict).extend(pairs.iter().map(|[k, v]| (k.clone(), v.clone())));
        self.push(item.value, item.depth.max(depth))
    }

    fn call(&mut self) -> Result<(), Problem> {
        let (args, callee) = (self.pop()?, self.pop()?);
        let (Value::Name(name), Value::List(list)) = (callee.value, args.value) else {
            return Err("the pickle calls something that has no name".into());
        };
        let value = match &*name {
            "collections OrderedDict" if list.is_empty() => Value::Dict(Rc::default()),
            _ => Value::Call(name, list),
        };
        self.push(value, args.depth + 1)
    }

    fn remember(&mut self, at: usize) -> Result<(), Problem> {
        // Writers number what they remember one after the other.
        if at > self.memo.len() {
            return Err("the pickle remembers out of order".into());
        }
        let item = self.stack.last().cloned().ok_or("the pickle takes more than there is")?;
        if at >= self.memo.len() {
            self.memo.resize(at + 1, None);
        }
        self.memo[at] = Some(item);
        Ok(())
    }

    fn recall(&mut self, at: usize) -> Result<(), Problem> {
        let item = self.memo.get(at).cloned().flatten().ok_or("the pickle recalls what it has not remembered")?;
        self.push(item.value, item.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_values_are_read() {
        // {'a': (1, -2, 300)} in protocol 2, as Python writes it.
        let bytes = b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01J\xfe\xff\xff\xffM,\x01\x87q\x02s.";
        let list = Value::List(Rc::new(vec![Value::Int(1), Value::Int(-2), Value::Int(300)]));
        assert_eq!(parse(bytes), Ok(Value::Dict(Rc::new(vec![(Value::Text("a".into()), list)]))));
    }

    #[test]
    fn calls_of_anything_are_refused() {
        // os.system('x'), the classical attack.
        let error = parse(b"cos\nsystem\n(S'x'\ntR.").unwrap_err();
        assert!(error.contains("`os system`"), "{error}");
        assert!(parse(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.").unwrap_err().contains("builtins eval"));
    }

    #[test]
    fn nonsense_is_refused_and_nothing_grows() {
        for bytes in
            [&b""[..], b".", b")", b"\x86.", b"t.", b"s.", b"a.", b"h\x05.", b"X\xff\xff\xff\xff.", b"(.", b"R."]
        {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
        assert!(parse(&[b")".to_vec(), b"\x85".repeat(100)].concat()).unwrap_err().contains("nests"));
        assert!(parse(b"Nr\xff\xff\xff\x7f.").unwrap_err().contains("remembers"));
        // A list of two copies of a list of two copies of …
        let doubling = [b")".to_vec(), b"q\x00h\x00\x86".repeat(12), b".".to_vec()].concat();
        assert!(parse(&doubling).is_ok());
    }
}
