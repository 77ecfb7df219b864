//! `ltxc inspect --html`: a plan as one page without anything outside of it.
//!
//! For each program the arena over time and the roofline of its kernels, for each function its steps with what flows between
//! them. Numbers come from the plan alone: the roofline shows what a kernel could reach on a device with the given limits.

use std::collections::BTreeMap;
use std::fmt::Write;

use ltxc_ir::plan::{FunctionCall, KernelCall, Operand, Place, Plan, PlanFunction, Program, SlotPlace, Step, Work};
use ltxc_runtime::memory::readable;

/// Ceilings of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Floating point operations, in 10⁹ a second.
    pub gflops: f64,
    /// Bytes to and from memory, in 10⁹ a second.
    pub gbytes: f64,
}

/// Most steps of a function that are drawn; others are counted.
const MOST_STEPS: usize = 400;

/// Most blocks of memory that are drawn for a program, the largest ones.
const MOST_BLOCKS: usize = 1500;

/// The page.
pub fn page(plan: &Plan, hash: &str, limits: Limits) -> String {
    let mut out = String::from(HEAD);
    let p = &plan.pipeline;
    let _ = write!(
        out,
        "<h1>{} <small>{} {}</small></h1><p>{}x{}, {} frames, target {}, activations in {}, written by {}<br><code>{hash}</code></p>",
        text(&p.name),
        text(&p.model.generation),
        text(&p.model.version),
        p.video.width,
        p.video.height,
        p.video.frames,
        text(&plan.target.backend),
        p.dtype,
        text(&plan.compiler),
    );
    let _ = write!(
        out,
        "<p class=note>Roofline for {} GFLOP/s and {} GB/s (<code>--peak-gflops</code>, <code>--peak-gbytes</code>). \
         Hover over anything for its numbers.</p><nav>",
        limits.gflops, limits.gbytes
    );
    for program in &plan.programs {
        let _ = write!(out, "<a href='#p-{0}'>{0}</a> ", text(&program.name));
    }
    out.push_str("</nav><h2>Programs</h2>");
    for program in &plan.programs {
        program_section(&mut out, plan, program, limits);
    }
    out.push_str("<h2>Functions</h2>");
    for (i, function) in plan.functions.iter().enumerate() {
        function_section(&mut out, plan, i, function);
    }
    out.push_str("</body></html>\n");
    out
}

const HEAD: &str = "<!doctype html><html lang=en><head><meta charset=utf-8><title>ltxc plan</title><style>\
    body{font:14px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1180px;padding:0 16px;color:#1d2430;background:#fff}\
    h1 small{font-weight:400;color:#667}h2{border-bottom:1px solid #ccd;padding-bottom:4px;margin-top:32px}\
    nav a{display:inline-block;margin-right:10px}code{font-size:12px;word-break:break-all}.note{color:#667}\
    table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px 2px 0;text-align:right}td:first-child,th:first-child{text-align:left}\
    svg{background:#f7f8fb;border:1px solid #dde;display:block;margin:8px 0}svg text{font:11px system-ui,sans-serif;fill:#445}\
    details{margin:6px 0}summary{cursor:pointer;font-weight:600}.cols{display:flex;flex-wrap:wrap;gap:16px}\
    rect.b:hover,circle:hover{stroke:#000;stroke-width:1.5}</style></head><body>";

/// Text as HTML.
fn text(raw: &str) -> String {
    raw.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&#39;").replace('"', "&quot;")
}

/// A colour for a kernel, the same everywhere.
fn colour(kernel: &str) -> String {
    let hash = kernel.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    format!("hsl({} 55% 58%)", hash % 360)
}

/// A kernel call of a program, in the order in which calls run.
struct Call<'a> {
    kernel: &'a str,
    name: String,
    flops: u64,
    bytes: u64,
}

/// Memory of an arena that is in use from one call to another.
#[derive(Clone, Debug)]
struct Block {
    arena: u32,
    offset: u64,
    bytes: u64,
    first: usize,
    last: usize,
    name: String,
}

/// Follows the calls of a program.
struct Walk<'a> {
    plan: &'a Plan,
    calls: Vec<Call<'a>>,
    blocks: Vec<Block>,
    /// The block that was written last at a place.
    open: BTreeMap<(u32, u64), usize>,
}

/// Where something lies: arena and offset, or nowhere in the arenas.
type At = Option<(u32, u64)>;

impl<'a> Walk<'a> {
    fn of(plan: &'a Plan, program: &'a Program) -> Walk<'a> {
        let mut walk = Walk { plan, calls: Vec::new(), blocks: Vec::new(), open: BTreeMap::new() };
        let place = |p: &SlotPlace| match *p {
            SlotPlace::Arena { arena, offset } => Some((arena, offset)),
            SlotPlace::State { .. } => None,
        };
        let inputs: Vec<At> = program.inputs.iter().map(|s| place(&s.place)).collect();
        let outputs: Vec<At> = program.outputs.iter().map(|s| place(&s.place)).collect();
        for (slot, at) in program.inputs.iter().zip(&inputs) {
            walk.write(*at, slot.ty.bytes() as u64, &slot.name);
        }
        walk.function(program.function, &program.frame, &inputs, &outputs, "");
        let last = walk.calls.len();
        outputs.iter().for_each(|at| walk.read(*at, last));
        walk
    }

    fn function(&mut self, function: u32, frame: &[u64], params: &[At], results: &[At], path: &str) {
        let plan = self.plan;
        let Some(body) = plan.functions.get(function as usize) else { return };
        let at = |o: &Operand| -> At {
            let base = match o.place {
                Place::Frame { arena } => Some((arena, *frame.get(arena as usize)?)),
                Place::Param(i) => *params.get(i as usize)?,
                Place::Result(i) => *results.get(i as usize)?,
                Place::Weight(_) | Place::Constant => None,
            };
            base.map(|(arena, offset)| (arena, offset.saturating_add(o.offset)))
        };
        for step in &body.steps {
            match step {
                Step::Kernel(call) => self.kernel(call, path, &at),
                Step::Call(call) => self.call(call, frame, path, &at),
            }
        }
    }

    fn kernel(&mut self, call: &'a KernelCall, path: &str, at: &dyn Fn(&Operand) -> At) {
        let name = match (path, call.name.as_str()) {
            ("", own) => own.to_string(),
            (path, "") => path.to_string(),
            (path, own) => format!("{path}.{own}"),
        };
        let number = self.calls.len();
        call.args.iter().for_each(|a| self.read(at(a), number));
        for result in &call.results {
            self.write(at(result), result.ty.bytes() as u64, &name);
        }
        self.calls.push(Call { kernel: call.work.name(), name, flops: call.flops, bytes: call.bytes });
    }

    fn call(&mut self, call: &FunctionCall, frame: &[u64], path: &str, at: &dyn Fn(&Operand) -> At) {
        let inner: Vec<u64> = frame.iter().zip(&call.frame).map(|(a, b)| a.saturating_add(*b)).collect();
        let (params, results): (Vec<At>, Vec<At>) =
            (call.args.iter().map(at).collect(), call.results.iter().map(at).collect());
        let path = if path.is_empty() { call.name.clone() } else { format!("{path}.{}", call.name) };
        self.function(call.function, &inner, &params, &results, &path);
    }

    fn read(&mut self, at: At, call: usize) {
        if let Some(&block) = at.and_then(|at| self.open.get(&at)) {
            self.blocks[block].last = call;
        }
    }

    fn write(&mut self, at: At, bytes: u64, name: &str) {
        let Some((arena, offset)) = at else { return };
        let call = self.calls.len();
        self.open.insert((arena, offset), self.blocks.len());
        self.blocks.push(Block { arena, offset, bytes, first: call, last: call, name: name.into() });
    }
}

fn program_section(out: &mut String, plan: &Plan, program: &Program, limits: Limits) {
    let walk = Walk::of(plan, program);
    let (flops, bytes) =
        walk.calls.iter().fold((0u64, 0u64), |(f, b), c| (f.saturating_add(c.flops), b.saturating_add(c.bytes)));
    let arena = program.arena_bytes.iter().fold(0u64, |n, &b| n.saturating_add(b));
    let _ = write!(
        out,
        "<section id='p-{0}'><h3>{0}</h3><p>{1} rate, {2} kernel calls, {3:.3} GFLOP, {4} moved, arena {5}</p><div class=cols><div>",
        text(&program.name),
        program.rate.name(),
        walk.calls.len(),
        flops as f64 / 1e9,
        readable(bytes),
        readable(arena),
    );
    memory_chart(out, program, &walk);
    out.push_str("</div><div>");
    roofline(out, &walk.calls, limits);
    out.push_str("</div></div>");
    kernel_table(out, &walk.calls, limits);
    out.push_str("</section>");
}

/// Blocks of memory: calls from left to right, offsets from bottom to top.
fn memory_chart(out: &mut String, program: &Program, walk: &Walk<'_>) {
    const WIDTH: f64 = 560.0;
    const HEIGHT: f64 = 300.0;
    let calls = walk.calls.len().max(1) as f64;
    let starts: Vec<u64> = program
        .arena_bytes
        .iter()
        .scan(0u64, |sum, &bytes| {
            let start = *sum;
            *sum = sum.saturating_add(bytes);
            Some(start)
        })
        .collect();
    let total = program.arena_bytes.iter().fold(0u64, |n, &b| n.saturating_add(b)).max(1) as f64;
    let mut blocks: Vec<&Block> = walk.blocks.iter().collect();
    blocks.sort_by_key(|b| std::cmp::Reverse(b.bytes.saturating_mul((b.last - b.first + 1) as u64)));
    let left_out = blocks.len().saturating_sub(MOST_BLOCKS);
    let _ = write!(out, "<svg width={WIDTH} height={} viewBox='0 0 {WIDTH} {}'>", HEIGHT + 34.0, HEIGHT + 34.0);
    for b in blocks.into_iter().take(MOST_BLOCKS) {
        let base = starts.get(b.arena as usize).copied().unwrap_or(0);
        let x = b.first as f64 / calls * WIDTH;
        let width = ((b.last + 1 - b.first) as f64 / calls * WIDTH).max(0.6);
        let height = (b.bytes as f64 / total * HEIGHT).max(0.4);
        let y = HEIGHT - (base.saturating_add(b.offset)) as f64 / total * HEIGHT - height;
        let _ = write!(
            out,
            "<rect class=b x={x:.2} y={y:.2} width={width:.2} height={height:.2} fill='{}' fill-opacity=.75><title>{} {}\ncalls {} to {}, arena {} + {}</title></rect>",
            colour(b.name.rsplit('.').next().unwrap_or_default()),
            text(if b.name.is_empty() { "(unnamed)" } else { &b.name }),
            readable(b.bytes),
            b.first,
            b.last,
            b.arena,
            b.offset
        );
    }
    let _ = write!(
        out,
        "<text x=4 y={}>call 0</text><text x={} y={} text-anchor=end>call {}</text><text x={} y={} text-anchor=middle>arena over time, {} high{}</text></svg>",
        HEIGHT + 14.0,
        WIDTH - 4.0,
        HEIGHT + 14.0,
        walk.calls.len(),
        WIDTH / 2.0,
        HEIGHT + 28.0,
        readable(total as u64),
        if left_out > 0 { format!(", {left_out} small blocks left out") } else { String::new() },
    );
}

/// Calls by arithmetic intensity and attainable speed, on logarithmic axes, under the roof of the device.
fn roofline(out: &mut String, calls: &[Call<'_>], limits: Limits) {
    const WIDTH: f64 = 480.0;
    const HEIGHT: f64 = 300.0;
    // Intensities from 2^-6 to 2^14, speeds down to 2^-12 of the ceiling.
    let x = |intensity: f64| ((intensity.max(1e-9).log2() + 6.0) / 20.0).clamp(0.0, 1.0) * WIDTH;
    let y = |share: f64| HEIGHT - ((share.max(1e-9).log2() + 12.0) / 12.5).clamp(0.0, 1.0) * (HEIGHT - 10.0);
    let ridge = limits.gflops / limits.gbytes;
    let _ = write!(out, "<svg width={WIDTH} height={0} viewBox='0 0 {WIDTH} {0}'>", HEIGHT + 34.0);
    let left = 2f64.powi(-6);
    let _ = write!(
        out,
        "<polyline fill=none stroke='#99a' points='{:.1},{:.1} {:.1},{:.1} {WIDTH},{:.1}'/>",
        x(left),
        y(left / ridge),
        x(ridge),
        y(1.0),
        y(1.0)
    );
    let most = calls.iter().map(|c| c.bytes).max().unwrap_or(1).max(1) as f64;
    // Calls of one kernel and size lie on each other; each is drawn once.
    let mut drawn: BTreeMap<(&str, u64, u64), (usize, &Call<'_>)> = BTreeMap::new();
    for call in calls.iter().filter(|c| c.bytes > 0) {
        drawn.entry((call.kernel, call.flops, call.bytes)).or_insert((0, call)).0 += 1;
    }
    for (count, call) in drawn.values() {
        let intensity = call.flops as f64 / call.bytes as f64;
        let share = (intensity / ridge).min(1.0);
        let radius = 2.0 + 9.0 * (call.bytes as f64 / most).sqrt();
        let _ = write!(
            out,
            "<circle cx={:.1} cy={:.1} r={radius:.1} fill='{}' fill-opacity=.6><title>{} {}\n{count} calls, {:.4} GFLOP, {} each\n{intensity:.2} FLOP per byte, at most {:.1} GFLOP/s</title></circle>",
            x(intensity),
            y(share),
            colour(call.kernel),
            text(call.kernel),
            text(&call.name),
            call.flops as f64 / 1e9,
            readable(call.bytes),
            share * limits.gflops,
        );
    }
    let _ = write!(
        out,
        "<text x=4 y={0}>1/64 FLOP per byte</text><text x={1} y={0} text-anchor=end>16384</text>\
         <text x={2:.0} y={0} text-anchor=middle>ridge {ridge:.1}</text>\
         <text x={3} y={4} text-anchor=middle>roofline, area is bytes</text></svg>",
        HEIGHT + 14.0,
        WIDTH - 4.0,
        x(ridge),
        WIDTH / 2.0,
        HEIGHT + 28.0
    );
}

/// Totals by kernel, with the least time that the device would need.
fn kernel_table(out: &mut String, calls: &[Call<'_>], limits: Limits) {
    let mut kernels: BTreeMap<&str, (usize, f64, f64, f64)> = BTreeMap::new();
    for call in calls {
        let (flops, bytes) = (call.flops as f64, call.bytes as f64);
        let least = (flops / limits.gflops / 1e9).max(bytes / limits.gbytes / 1e9);
        let entry = kernels.entry(call.kernel).or_default();
        *entry = (entry.0 + 1, entry.1 + flops, entry.2 + bytes, entry.3 + least);
    }
    let mut rows: Vec<_> = kernels.into_iter().collect();
    rows.sort_by(|a, b| b.1.3.total_cmp(&a.1.3));
    let total: f64 = rows.iter().map(|r| r.1.3).sum();
    out.push_str("<details><summary>kernels</summary><table><tr><th>kernel<th>calls<th>GFLOP<th>bytes<th>FLOP/byte<th>least time<th>share</tr>");
    for (kernel, (count, flops, bytes, least)) in rows {
        let _ = write!(
            out,
            "<tr><td><svg width=10 height=10 style='display:inline-block;margin:0 6px 0 0'><rect width=10 height=10 fill='{}'/></svg>{}<td>{count}<td>{:.3}<td>{}<td>{:.2}<td>{:.3} ms<td>{:.1} %</tr>",
            colour(kernel),
            text(kernel),
            flops / 1e9,
            readable(bytes as u64),
            flops / bytes.max(1.0),
            least * 1e3,
            least / total.max(1e-30) * 100.0
        );
    }
    out.push_str("</table></details>");
}

/// Steps of a function from top to bottom, with an arc from each value to every step that reads it.
fn function_section(out: &mut String, plan: &Plan, index: usize, function: &PlanFunction) {
    const ROW: f64 = 22.0;
    const LEFT: f64 = 170.0;
    const WIDTH: f64 = 1120.0;
    let steps = function.steps.len();
    let shown = steps.min(MOST_STEPS);
    let _ = write!(
        out,
        "<details{}><summary>@{} <small>{steps} steps, {} weights</small></summary>",
        if index == 0 { " open" } else { "" },
        text(&function.name),
        function.weights.len()
    );
    let _ = write!(out, "<svg width={WIDTH} height={0} viewBox='0 0 {WIDTH} {0}'>", shown as f64 * ROW + 10.0);
    let mut written: BTreeMap<(u8, u32, u64), usize> = BTreeMap::new();
    let key = |o: &Operand| match o.place {
        Place::Frame { arena } => Some((0u8, arena, o.offset)),
        Place::Result(i) => Some((1, i, o.offset)),
        _ => None,
    };
    for (i, step) in function.steps.iter().take(shown).enumerate() {
        let (args, results, name) = match step {
            Step::Kernel(call) => (&call.args, &call.results, &call.name),
            Step::Call(call) => (&call.args, &call.results, &call.name),
        };
        let y = i as f64 * ROW + 14.0;
        for from in args.iter().filter_map(|a| written.get(&key(a)?)) {
            let start = *from as f64 * ROW + 14.0;
            let bend = (LEFT - 12.0 - ((y - start).sqrt() * 7.0)).max(4.0);
            let _ = write!(
                out,
                "<path d='M{LEFT} {start} C{bend:.0} {start} {bend:.0} {y} {LEFT} {y}' fill=none stroke='#8893b0' stroke-opacity='.55'/>"
            );
        }
        let weights = args.iter().filter(|a| matches!(a.place, Place::Weight(_))).count();
        let (title, kernel, parts) = match step {
            Step::Kernel(call) => match &call.work {
                Work::Kernel(kernel) => (kernel.name().to_string(), kernel.name().to_string(), String::new()),
                Work::Fused(fused) => {
                    let parts: Vec<&str> = fused.parts.iter().map(|p| p.kernel.name()).collect();
                    (format!("fused {}", fused.pattern), fused.pattern.clone(), parts.join(" → "))
                }
            },
            Step::Call(call) => {
                let callee = plan.functions.get(call.function as usize).map_or("?", |f| &f.name);
                (format!("call @{callee}"), "call".into(), format!("weights below {}", call.prefix))
            }
        };
        let types: Vec<String> = results.iter().map(|r| r.ty.to_string()).collect();
        let weights = if weights > 0 { format!(", {weights} weights") } else { String::new() };
        let _ = write!(
            out,
            "<g><rect class=b x={LEFT} y={:.0} width=300 height=17 rx=3 fill='{}' fill-opacity=.55><title>{}</title></rect>\
             <text x={} y={:.0}>{}</text><text x={} y={:.0}>{}</text></g>",
            y - 9.0,
            colour(&kernel),
            text(if parts.is_empty() { &title } else { &parts }),
            LEFT + 6.0,
            y + 4.0,
            text(&format!("{title}{weights}")),
            LEFT + 310.0,
            y + 4.0,
            text(&format!("{} {}", name, types.join(", "))),
        );
        for result in results {
            if let Some(key) = key(result) {
                written.insert(key, i);
            }
        }
    }
    out.push_str("</svg>");
    if steps > shown {
        let _ = write!(out, "<p class=note>{} more steps are not drawn.</p>", steps - shown);
    }
    out.push_str("</details>");
}
