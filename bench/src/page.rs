//! The results of a suite as one page that needs nothing else: how far each component comes with fusion, where kernels
//! stand under the roofline of the device, and what each of them reaches.

use std::fmt::Write;

use crate::kernels::KernelRow;
use crate::levels::ComponentRow;
use crate::report::figure;
use crate::suite::{Suite, percent};

/// Kernels whose bars are drawn.
const MOST_BARS: usize = 28;

/// Width of pictures in pixels.
const WIDTH: f64 = 1040.0;

/// Where bars begin.
const LABEL: f64 = 400.0;

/// Colours of what limits a kernel.
const MEMORY: &str = "#0f9d8a";
const ARITHMETIC: &str = "#5b5bd6";

/// Colours of the levels of fusion, the most first.
const LEVELS: [&str; 3] = ["#1f6feb", "#9aa4b2", "#d3d9e0"];

const STYLE: &str = "\
body{font:15px/1.5 system-ui,'DejaVu Sans',sans-serif;color:#1c2430;background:#f6f7f9;margin:0}\
main{max-width:1104px;margin:0 auto;padding:28px 32px 64px}\
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 4px}p{margin:4px 0 12px;color:#5a6472}\
.card{background:#fff;border:1px solid #e3e7ec;border-radius:12px;padding:20px 16px;overflow-x:auto}\
.tiles{display:flex;gap:14px;flex-wrap:wrap;margin:20px 0 0}\
.tile{background:#fff;border:1px solid #e3e7ec;border-radius:12px;padding:12px 18px;flex:1;min-width:150px}\
.tile b{display:block;font-size:22px;font-weight:600}.tile span{color:#5a6472;font-size:13px}\
code{font-size:12.5px;color:#3b4452}\
svg{display:block;font:12.5px system-ui,'DejaVu Sans',sans-serif}\
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 5px 0 14px;vertical-align:-1px}\
.keys{white-space:nowrap}";

/// The page.
pub fn html(suite: &Suite) -> String {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>ltxc on {0}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body><main>\
         <h1>ltxc on {0}</h1><p>{1}<br>{2} · {3}</p>",
        escape(&suite.device.join(": ")),
        escape(&suite.what),
        escape(&suite.machine.to_string()),
        suite.date,
    );
    tiles(&mut out, suite);
    if !suite.components.is_empty() {
        section(
            &mut out,
            "Fused, one kernel per composite, and none",
            &format!(
                "Time of one run of each component; shorter is better. {}{}{}",
                key(LEVELS[0], "full fusion"),
                key(LEVELS[1], "one kernel per composite"),
                key(LEVELS[2], "one kernel per primitive")
            ),
            &components(&suite.components),
        );
    }
    if !suite.kernels.is_empty() {
        let colours = format!("{}{}", key(MEMORY, "limited by memory"), key(ARITHMETIC, "limited by arithmetic"));
        section(
            &mut out,
            "Roofline",
            &format!(
                "Each circle is a kernel, its area the time that a run of its component spends in it. The line is what this \
                 device was measured to do at best. {colours}"
            ),
            &roofline(suite),
        );
        section(
            &mut out,
            "Kernels",
            &format!(
                "Part of the device's measured ceiling, the kernels with the most time first; behind it how many times as fast \
                 a fused call is as its parts. {colours}"
            ),
            &kernels(&suite.kernels),
        );
    }
    if !suite.notes.is_empty() {
        let notes: String = suite.notes.iter().map(|note| format!("<li>{}</li>", escape(note))).collect();
        put(&mut out, format!("<h2>Notes</h2><ul>{notes}</ul>"));
    }
    put(&mut out, format!("<p><code>{}</code></p></main></body></html>\n", escape(&suite.command)));
    out
}

fn tiles(out: &mut String, suite: &Suite) {
    let c = &suite.ceilings;
    let mut tiles = vec![
        (format!("{} GB/s", figure(c.copy / 1e9)), "best copy".to_string()),
        (rate(c.product_f32), "best product, f32".into()),
        (rate(c.product_bf16), "best product, bf16".into()),
    ];
    if let Some(component) = suite.components.first()
        && let [full, composite, ..] = &component.levels[..]
    {
        tiles.push((
            format!("{} ×", figure(1.0 / composite.full_by_this)),
            format!("{}, fused against composite", component.name),
        ));
        let saved = 1.0 - full.elementwise_bytes as f64 / composite.elementwise_bytes.max(1) as f64;
        tiles.push((format!("−{}", percent(saved)), "of its elementwise bytes".into()));
    }
    let tiles: String = tiles
        .iter()
        .map(|(v, what)| format!("<div class=\"tile\"><b>{v}</b><span>{}</span></div>", escape(what)))
        .collect();
    put(out, format!("<div class=\"tiles\">{tiles}</div>"));
}

fn section(out: &mut String, title: &str, text: &str, picture: &str) {
    put(out, format!("<h2>{title}</h2><p>{text}</p><div class=\"card\">{picture}</div>"));
}

fn key(colour: &str, text: &str) -> String {
    format!("<span class=\"keys\"><span class=\"key\" style=\"background:{colour}\"></span>{text}</span> ")
}

/// Bars of all levels of each component, as long as their part of the slowest.
fn components(components: &[ComponentRow]) -> String {
    const BAR: f64 = 20.0;
    let room = WIDTH - LABEL - 190.0;
    let (mut body, mut y) = (String::new(), 8.0);
    for component in components {
        let others = component.others.iter().map(|o| (o.name.as_str(), o.seconds, "#e0a100"));
        let levels = component.levels.iter().zip(LEVELS).map(|(l, colour)| (l.level.as_str(), l.seconds, colour));
        let bars: Vec<(&str, f64, &str)> = levels.chain(others).collect();
        let most = bars.iter().map(|b| b.1).fold(0.0, f64::max);
        put(&mut body, label(LABEL - 14.0, y + 15.0, "end", "600", "#1c2430", &component.name));
        for (i, part) in wrapped(&component.sizes, 56).iter().take(2).enumerate() {
            put(&mut body, label(LABEL - 14.0, y + 33.0 + 16.0 * i as f64, "end", "400", "#5a6472", part));
        }
        for (i, (name, seconds, colour)) in bars.iter().enumerate() {
            let width = room * seconds / most;
            put(&mut body, bar(LABEL, y, width, BAR - 4.0, colour));
            let ratio = component
                .levels
                .get(i)
                .filter(|_| i > 0)
                .map(|l| format!(", full is {} ×", figure(1.0 / l.full_by_this)));
            let text = format!("{} ms {name}{}", figure(seconds * 1e3), ratio.unwrap_or_default());
            put(&mut body, label(LABEL + width + 8.0, y + 13.0, "start", "400", "#1c2430", &text));
            y += BAR;
        }
        y += 16.0 + (3 - bars.len().min(3)) as f64 * BAR;
    }
    svg(y, &body)
}

/// Achieved rate over operations per byte, both logarithmic, under the ceilings.
fn roofline(suite: &Suite) -> String {
    const HEIGHT: f64 = 430.0;
    let (left, right, top, bottom) = (76.0, WIDTH - 24.0, 24.0, HEIGHT - 48.0);
    let shown: Vec<&KernelRow> =
        suite.kernels.iter().filter(|k| k.flops > 0 && k.bytes > 0 && k.seconds > 0.0).collect();
    let intensity = |k: &KernelRow| k.flops as f64 / k.bytes as f64;
    let achieved = |k: &KernelRow| k.flops as f64 / k.seconds;
    let extent = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0f64), |(l, h), v| (l.min(v), h.max(v)));
        (low.log10().floor(), high.log10().ceil())
    };
    if shown.is_empty() {
        return svg(20.0, "");
    }
    let peak = suite.ceilings.product_f32.max(suite.ceilings.product_bf16);
    let (x0, x1) = extent(&mut shown.iter().map(|k| intensity(k)).chain([1.0, 1.5 * peak / suite.ceilings.copy]));
    let (y0, y1) = extent(&mut shown.iter().map(|k| achieved(k)).chain([peak]));
    let x = |v: f64| left + (right - left) * (v.log10() - x0) / (x1 - x0);
    let y = |v: f64| bottom - (bottom - top) * (v.log10() - y0) / (y1 - y0);
    let mut body = String::new();
    for decade in x0 as i32..=x1 as i32 {
        let (at, text) = (x(10f64.powi(decade)), figure(10f64.powi(decade)));
        put(
            &mut body,
            format!("<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#eceff3\"/>"),
        );
        put(&mut body, label(at, bottom + 18.0, "middle", "400", "#5a6472", &text));
    }
    for decade in y0 as i32..=y1 as i32 {
        let at = y(10f64.powi(decade));
        put(
            &mut body,
            format!("<line x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#eceff3\"/>"),
        );
        put(&mut body, label(left - 8.0, at + 4.0, "end", "400", "#5a6472", &decade_of(decade)));
    }
    put(&mut body, label(left - 8.0, top - 10.0, "end", "400", "#5a6472", "FLOP/s"));
    put(&mut body, label(right, bottom + 38.0, "end", "400", "#5a6472", "operations per byte"));
    let mut roofs = vec![(suite.ceilings.product_f32, "f32")];
    if suite.kernels.iter().any(|k| k.types.starts_with("bf16")) {
        roofs.push((suite.ceilings.product_bf16, "bf16"));
    }
    for (roof, name) in roofs {
        let ridge = roof / suite.ceilings.copy;
        let low = 10f64.powf(x0).max(10f64.powf(y0) / suite.ceilings.copy);
        put(
            &mut body,
            format!(
                "<polyline fill=\"none\" stroke=\"#1c2430\" stroke-width=\"1.6\" points=\"{:.1},{:.1} {:.1},{:.1} {right},{:.1}\"/>",
                x(low),
                y(low * suite.ceilings.copy),
                x(ridge),
                y(roof),
                y(roof)
            ),
        );
        put(
            &mut body,
            label(right - 4.0, y(roof) - 6.0, "end", "400", "#1c2430", &format!("{name}: {}/s", rate_of(roof))),
        );
    }
    let time = |k: &KernelRow| k.seconds * k.calls as f64;
    let most = shown.iter().map(|k| time(k)).fold(0.0, f64::max);
    let mut sorted = shown;
    sorted.sort_by(|a, b| time(b).total_cmp(&time(a)));
    for k in sorted {
        let radius = 3.0 + 22.0 * (time(k) / most).sqrt();
        put(
            &mut body,
            format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius:.1}\" fill=\"{}\" fill-opacity=\"0.55\" stroke=\"#fff\">\
                 <title>{} {}: {} ms, {} of the ceiling</title></circle>",
                x(intensity(k)),
                y(achieved(k)),
                colour(k),
                escape(&k.kernel),
                escape(&k.types),
                figure(k.seconds * 1e3),
                percent(k.share)
            ),
        );
    }
    svg(HEIGHT, &body)
}

/// A bar of the ceiling's share for each kernel.
fn kernels(kernels: &[KernelRow]) -> String {
    const ROW: f64 = 23.0;
    let room = WIDTH - LABEL - 260.0;
    let mut sorted: Vec<&KernelRow> = kernels.iter().collect();
    let time = |k: &KernelRow| k.seconds * k.calls as f64;
    sorted.sort_by(|a, b| time(b).total_cmp(&time(a)));
    sorted.truncate(MOST_BARS);
    let bottom = 24.0 + ROW * sorted.len() as f64;
    let mut body = String::new();
    for quarter in 0..=4 {
        let at = LABEL + room * f64::from(quarter) / 4.0;
        put(&mut body, format!("<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"18\" y2=\"{bottom}\" stroke=\"#eceff3\"/>"));
        put(&mut body, label(at, 12.0, "middle", "400", "#5a6472", &format!("{} %", 25 * quarter)));
    }
    for (i, k) in sorted.iter().enumerate() {
        let y = 24.0 + ROW * i as f64;
        put(&mut body, label(LABEL - 10.0, y + 13.0, "end", "400", "#1c2430", &shortened(&name_of(k), 58)));
        put(&mut body, bar(LABEL, y, room * k.share.clamp(0.0, 1.15), ROW - 7.0, colour(k)));
        let mut text = format!("{}  {} ms", percent(k.share), figure(k.seconds * 1e3));
        if let Some(apart) = &k.apart {
            let _ = write!(text, ", fused {} ×", figure(apart.seconds / k.seconds));
        }
        if let Some(other) = &k.other {
            let _ = write!(text, ", {} {} ms", other.name, figure(other.seconds * 1e3));
        }
        put(
            &mut body,
            label(LABEL + room * k.share.clamp(0.0, 1.15) + 8.0, y + 13.0, "start", "400", "#3b4452", &text),
        );
    }
    svg(bottom + 8.0, &body)
}

/// What a kernel is called in a picture: its name, where it stands, and what it makes.
fn name_of(k: &KernelRow) -> String {
    let made = k.types.rsplit("→ ").next().unwrap_or_default();
    let place = k.example.rsplit('.').next().unwrap_or_default();
    let place = if place.is_empty() { String::new() } else { format!(" {place}") };
    format!("{}{place}  {made}", k.kernel)
}

fn colour(k: &KernelRow) -> &'static str {
    if k.is_arithmetic { ARITHMETIC } else { MEMORY }
}

fn rate(flops: f64) -> String {
    format!("{}/s", rate_of(flops))
}

/// A power of ten as an axis names it: `100 G`.
fn decade_of(decade: i32) -> String {
    let (unit, letter) = match decade {
        12.. => (12, "T"),
        9.. => (9, "G"),
        _ => (6, "M"),
    };
    format!("{} {letter}", 10f64.powi(decade - unit))
}

/// `1.5 TFLOP` and the like.
fn rate_of(flops: f64) -> String {
    let (value, unit) = match flops {
        f if f >= 1e12 => (f / 1e12, "TFLOP"),
        f if f >= 1e9 => (f / 1e9, "GFLOP"),
        f => (f / 1e6, "MFLOP"),
    };
    format!("{} {unit}", figure(value))
}

fn svg(height: f64, body: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\">{body}</svg>")
}

fn bar(x: f64, y: f64, width: f64, height: f64, colour: &str) -> String {
    let width = width.max(1.0);
    format!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"3\" fill=\"{colour}\"/>")
}

fn label(x: f64, y: f64, anchor: &str, weight: &str, colour: &str, text: &str) -> String {
    format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\" fill=\"{colour}\">{}</text>",
        escape(text)
    )
}

/// Lines of at most `width` characters, cut between words.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + word.chars().count() < width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most { text.into() } else { text.chars().take(most - 1).chain(['…']).collect() }
}

fn put(out: &mut String, text: String) {
    out.push_str(&text);
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
