//! The text form of a graph, for tests, reports and bug reports. Printing and parsing are inverse.
//!
//! ```text
//! fn @main(%0: f32[2,8] "x", %1: bf16[8] generation "scale") {
//!   %2 = rms_norm %0 {"eps":1e-6} : f32[2,8] "norm"
//!   %3 = mul %2, %1 : f32[2,8]            ; comments run to the end of the line
//!   return %3 "y"
//! }
//! entry @main
//! ```
//!
//! A fused group has `fused <pattern>` between its parameters and its body.
//!
//! Values are numbered in order of definition. Attributes are a JSON object, names are JSON strings; both are left out
//! when empty, and so is the rate `step`. The parser only builds the data; [`crate::verify`] says whether it means
//! anything.

use std::fmt::{self, Write};

use crate::graph::{Function, FunctionResult, Module, Node, Param, Rate, ValueId};
use crate::ops::Op;
use crate::types::TensorType;

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, function) in self.functions.iter().enumerate() {
            if i > 0 {
                f.write_char('\n')?;
            }
            write!(f, "{function}")?;
        }
        self.entries.iter().try_for_each(|e| writeln!(f, "entry @{e}"))
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fn @{}(", self.name)?;
        for (i, p) in self.params.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{}: {}", p.value, self.ty(p.value))?;
            if p.rate != Rate::Step {
                write!(f, " {}", p.rate.name())?;
            }
            f.write_str(&quoted(self.name_of(p.value)))?;
        }
        f.write_str(")")?;
        if let Some(pattern) = &self.pattern {
            write!(f, " fused {pattern}")?;
        }
        f.write_str(" {\n")?;
        for node in &self.nodes {
            writeln!(f, "  {}", node_text(self, node))?;
        }
        f.write_str("  return")?;
        for (i, r) in self.results.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma} {}{}", r.value, quoted(&r.name))?;
        }
        f.write_str("\n}\n")
    }
}

/// One node as it stands in the text, without indentation.
pub fn node_text(function: &Function, node: &Node) -> String {
    let list = |ids: &[ValueId]| ids.iter().map(ValueId::to_string).collect::<Vec<_>>().join(", ");
    let mut line = format!("{} = {}", list(&node.results), node.op.name());
    if !node.args.is_empty() {
        line += &format!(" {}", list(&node.args));
    }
    match node.op.attributes() {
        serde_json::Value::Object(map) if map.is_empty() => {}
        attributes => line += &format!(" {attributes}"),
    }
    // Ids may be out of range in a graph that is about to be reported as broken.
    let written = node.results.iter().map(|r| match function.values.get(r.index()) {
        Some(value) => format!("{}{}", value.ty, quoted(&value.name)),
        None => "?".into(),
    });
    line + &format!(" : {}", written.collect::<Vec<_>>().join(", "))
}

fn quoted(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(" {}", serde_json::Value::from(name)) }
}

/// Text that is not a graph.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// Line number, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// Parses the text form of a module.
///
/// # Errors
/// The first line that is not understood.
pub fn parse(text: &str) -> Result<Module, ParseError> {
    let mut module = Module::default();
    let mut open: Option<Function> = None;
    for (i, raw) in text.lines().enumerate() {
        let line = without_comment(raw).trim();
        if line.is_empty() {
            continue;
        }
        parse_line(line, &mut module, &mut open).map_err(|problem| ParseError { line: i + 1, problem })?;
    }
    match open {
        Some(f) => {
            Err(ParseError { line: text.lines().count(), problem: format!("function `{}` is not closed", f.name) })
        }
        None => Ok(module),
    }
}

/// Cuts off a comment: a `;` that is not inside a JSON string.
fn without_comment(line: &str) -> &str {
    let (mut in_string, mut escaped) = (false, false);
    for (i, c) in line.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            ';' if !in_string => return &line[..i],
            _ => {}
        }
    }
    line
}

fn parse_line(line: &str, module: &mut Module, open: &mut Option<Function>) -> Result<(), String> {
    let mut cursor = Cursor { rest: line };
    match open {
        None if cursor.eat("entry @") => {
            module.entries.push(cursor.word()?);
            cursor.end()
        }
        None if cursor.eat("fn @") => {
            *open = Some(parse_head(&mut cursor)?);
            cursor.end()
        }
        None => Err("expected `fn @name(…) {` or `entry @name`".into()),
        Some(function) if cursor.eat("return") => {
            while !cursor.rest.is_empty() {
                let value = cursor.value()?;
                function.results.push(FunctionResult { name: cursor.name()?, value });
                if !cursor.eat(",") {
                    break;
                }
            }
            cursor.end()
        }
        Some(_) if line == "}" => {
            module.functions.extend(open.take());
            Ok(())
        }
        Some(function) => parse_node(&mut cursor, function),
    }
}

fn parse_head(cursor: &mut Cursor<'_>) -> Result<Function, String> {
    let mut function = Function { name: cursor.word()?, ..Function::default() };
    cursor.expect("(")?;
    while !cursor.eat(")") {
        let value = cursor.value()?;
        cursor.expect(":")?;
        let ty = cursor.ty()?;
        let rate = match cursor.rest.chars().next() {
            Some(c) if c.is_ascii_lowercase() => {
                let word = cursor.word()?;
                Rate::from_name(&word).ok_or_else(|| format!("unknown rate `{word}`"))?
            }
            _ => Rate::Step,
        };
        let name = cursor.name()?;
        define(&mut function, value, ty, name)?;
        function.params.push(Param { value, rate });
        if !cursor.eat(",") {
            cursor.expect(")")?;
            break;
        }
    }
    if cursor.eat("fused ") {
        function.pattern = Some(cursor.word()?);
    }
    cursor.expect("{")?;
    Ok(function)
}

fn parse_node(cursor: &mut Cursor<'_>, function: &mut Function) -> Result<(), String> {
    let mut results = vec![cursor.value()?];
    while cursor.eat(",") {
        results.push(cursor.value()?);
    }
    cursor.expect("=")?;
    let name = cursor.word()?;
    let mut args = Vec::new();
    if cursor.rest.starts_with('%') {
        args.push(cursor.value()?);
        while cursor.eat(",") {
            args.push(cursor.value()?);
        }
    }
    let attributes = if cursor.rest.starts_with('{') { cursor.json()? } else { serde_json::json!({}) };
    let op = Op::from_text(&name, attributes).map_err(|e| format!("`{name}`: {e}"))?;
    cursor.expect(":")?;
    for (i, &id) in results.iter().enumerate() {
        if i > 0 {
            cursor.expect(",")?;
        }
        let ty = cursor.ty()?;
        let name = cursor.name()?;
        define(function, id, ty, name)?;
    }
    cursor.end()?;
    function.nodes.push(Node { op, args, results });
    Ok(())
}

fn define(function: &mut Function, value: ValueId, ty: TensorType, name: String) -> Result<(), String> {
    if value.index() != function.values.len() {
        return Err(format!("{value} is defined where %{} is next", function.values.len()));
    }
    function.add_value(ty, name);
    Ok(())
}

/// What is left of a line.
struct Cursor<'a> {
    rest: &'a str,
}

impl Cursor<'_> {
    fn skip(&mut self, bytes: usize) {
        self.rest = self.rest[bytes..].trim_start();
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest.starts_with(token);
        if found {
            self.skip(token.len());
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.eat(token) { Ok(()) } else { Err(format!("expected `{token}` before `{}`", shortened(self.rest))) }
    }

    fn end(&self) -> Result<(), String> {
        if self.rest.is_empty() { Ok(()) } else { Err(format!("unexpected `{}`", shortened(self.rest))) }
    }

    fn word(&mut self) -> Result<String, String> {
        let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
        let n = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        if n == 0 {
            return Err(format!("expected a word before `{}`", shortened(self.rest)));
        }
        let word = self.rest[..n].to_string();
        self.skip(n);
        Ok(word)
    }

    fn value(&mut self) -> Result<ValueId, String> {
        self.expect("%")?;
        let word = self.word()?;
        word.parse().map(ValueId).map_err(|_| format!("`%{word}` is not a value"))
    }

    fn ty(&mut self) -> Result<TensorType, String> {
        let n = self.rest.find(']').map_or(self.rest.len(), |i| i + 1);
        let ty = TensorType::parse(&self.rest[..n])
            .ok_or_else(|| format!("`{}` is not a type", shortened(&self.rest[..n])))?;
        self.skip(n);
        Ok(ty)
    }

    fn name(&mut self) -> Result<String, String> {
        if !self.rest.starts_with('"') {
            return Ok(String::new());
        }
        match self.json()? {
            serde_json::Value::String(name) => Ok(name),
            _ => Err("a name must be a string".into()),
        }
    }

    /// The JSON value at the cursor.
    fn json(&mut self) -> Result<serde_json::Value, String> {
        let mut stream = serde_json::Deserializer::from_str(self.rest).into_iter();
        match stream.next() {
            Some(Ok(value)) => {
                let n = stream.byte_offset();
                self.skip(n);
                Ok(value)
            }
            Some(Err(e)) => Err(e.to_string()),
            None => Err("expected JSON".into()),
        }
    }
}

fn shortened(text: &str) -> String {
    const MOST: usize = 40;
    if text.chars().count() <= MOST { text.into() } else { text.chars().take(MOST).chain(['…']).collect() }
}
