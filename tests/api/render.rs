//! Renders rustdoc's JSON output for a crate as text, with one line for each public item.

use std::collections::BTreeSet;

use serde_json::Value;

/// A crate as rustdoc describes it.
pub(crate) struct Crate<'a> {
    index: &'a Value,
    root: &'a Value,
}

impl<'a> Crate<'a> {
    pub(crate) fn new(description: &'a Value) -> Self {
        let index = &description["index"];
        let root = &index[&id(&description["root"])];
        Self { index, root }
    }

    /// Returns one line for each public item.
    pub(crate) fn items(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let name = text(&self.root["name"]);
        self.module(self.root, &name, &mut found);
        found
    }

    fn item(&self, of: &Value) -> Option<&'a Value> {
        let item = &self.index[&id(of)];
        (!item.is_null()).then_some(item)
    }

    fn module(&self, module: &Value, path: &str, found: &mut BTreeSet<String>) {
        for child in list(&module["inner"]["module"]["items"]) {
            let Some(item) = self.item(child) else {
                continue;
            };
            if item["inner"].get("use").is_some() {
                self.reexport(item, path, found);
            } else {
                self.describe(item, &format!("{path}::{}", text(&item["name"])), found);
            }
        }
    }

    fn reexport(&self, item: &Value, path: &str, found: &mut BTreeSet<String>) {
        let used = &item["inner"]["use"];
        let path = format!("{path}::{}", text(&used["name"]));
        match self.item(&used["id"]) {
            Some(target) => self.describe(target, &path, found),
            None => {
                found.insert(format!("use {} as {path}", text(&used["source"])));
            }
        }
    }

    fn describe(&self, item: &Value, path: &str, found: &mut BTreeSet<String>) {
        let Some((kind, inner)) = item["inner"]
            .as_object()
            .and_then(|inner| inner.iter().next())
        else {
            return;
        };
        let marks = marks(item);
        match kind.as_str() {
            "module" => {
                found.insert(format!("mod {path}"));
                self.module(item, path, found);
            }
            "function" => {
                found.insert(function(path, inner) + &marks);
            }
            "struct" => {
                found.insert(format!(
                    "struct {path}{}{marks}",
                    generics(&inner["generics"])
                ));
                let fields = &inner["kind"]["plain"]["fields"];
                self.fields(fields, path, found);
                self.impls(&inner["impls"], path, found);
            }
            "enum" => {
                found.insert(format!(
                    "enum {path}{}{marks}",
                    generics(&inner["generics"])
                ));
                for variant in list(&inner["variants"]) {
                    if let Some(variant) = self.item(variant) {
                        self.variant(variant, path, found);
                    }
                }
                self.impls(&inner["impls"], path, found);
            }
            "trait" => {
                found.insert(format!(
                    "trait {path}{}{}{marks}",
                    generics(&inner["generics"]),
                    bounds(": ", &inner["bounds"])
                ));
                for member in list(&inner["items"]) {
                    if let Some(member) = self.item(member) {
                        let name = text(&member["name"]);
                        self.describe(member, &format!("{path}::{name}"), found);
                    }
                }
            }
            "assoc_type" => {
                found.insert(format!("type {path}{}", bounds(": ", &inner["bounds"])));
            }
            "type_alias" => {
                found.insert(format!("type {path} = {}", type_of(&inner["type"])));
            }
            "constant" | "assoc_const" => {
                found.insert(format!("const {path}: {}", type_of(&inner["type"])));
            }
            other => {
                found.insert(format!("{other} {path}"));
            }
        }
    }

    fn fields(&self, fields: &Value, path: &str, found: &mut BTreeSet<String>) {
        for field in list(fields) {
            if let Some(field) = self.item(field).filter(|field| is_public(field)) {
                let of = type_of(&field["inner"]["struct_field"]);
                found.insert(format!("field {path}::{}: {of}", text(&field["name"])));
            }
        }
    }

    fn variant(&self, variant: &Value, path: &str, found: &mut BTreeSet<String>) {
        let path = format!("{path}::{}", text(&variant["name"]));
        let kind = &variant["inner"]["variant"]["kind"];
        let parts = list(&kind["tuple"]).chain(list(&kind["struct"]["fields"]));
        let parts: Vec<_> = parts
            .filter_map(|part| self.item(part))
            .map(|part| {
                let of = type_of(&part["inner"]["struct_field"]);
                format!("{}: {of}", text(&part["name"]))
            })
            .collect();
        found.insert(format!(
            "variant {path}({}){}",
            parts.join(", "),
            marks(variant)
        ));
    }

    fn impls(&self, impls: &Value, path: &str, found: &mut BTreeSet<String>) {
        for implementation in list(impls).filter_map(|one| self.item(one)) {
            let inner = &implementation["inner"]["impl"];
            let is_derived = inner["is_synthetic"] == true || !inner["blanket_impl"].is_null();
            if is_derived {
                let of = text(&inner["trait"]["path"]);
                if inner["is_negative"] == true && ["Send", "Sync", "Unpin"].contains(&&*of) {
                    found.insert(format!("impl !{of} for {path}"));
                }
                continue;
            }
            if inner["trait"].is_null() {
                for member in list(&inner["items"]).filter_map(|member| self.item(member)) {
                    if is_public(member) {
                        let name = text(&member["name"]);
                        self.describe(member, &format!("{path}::{name}"), found);
                    }
                }
            } else {
                found.insert(format!("impl {} for {path}", path_of(&inner["trait"])));
            }
        }
    }
}

fn function(path: &str, function: &Value) -> String {
    let signature = &function["sig"];
    let inputs: Vec<_> = list(&signature["inputs"])
        .map(|input| format!("{}: {}", text(&input[0]), type_of(&input[1])))
        .collect();
    let output = match &signature["output"] {
        Value::Null => String::new(),
        output => format!(" -> {}", type_of(output)),
    };
    let header = &function["header"];
    let mut words = String::new();
    for (flag, word) in [("is_const", "const "), ("is_async", "async ")] {
        if header[flag] == true {
            words += word;
        }
    }
    let generics = generics(&function["generics"]);
    format!("{words}fn {path}{generics}({}){output}", inputs.join(", "))
}

/// Renders the attributes `must_use` and `non_exhaustive`, on which callers depend.
fn marks(item: &Value) -> String {
    let mut marks = String::new();
    for attribute in list(&item["attrs"]) {
        let name = match attribute {
            Value::Object(fields) => fields.keys().next().map_or("", String::as_str),
            other => other.as_str().unwrap_or_default(),
        };
        for mark in ["must_use", "non_exhaustive"] {
            if name.trim_start_matches("#[").starts_with(mark) {
                marks += &format!(" #[{mark}]");
            }
        }
    }
    marks
}

fn generics(generics: &Value) -> String {
    let params: Vec<_> = list(&generics["params"])
        // rustdoc lists a type parameter for each `impl Trait` argument. The parameter is omitted here, because the type of the argument
        // already shows the trait.
        .filter(|param| param["kind"]["type"]["is_synthetic"] != true)
        .map(|param| {
            let bounds = bounds(": ", &param["kind"]["type"]["bounds"]);
            format!("{}{bounds}", text(&param["name"]))
        })
        .collect();
    let wheres: Vec<_> = list(&generics["where_predicates"])
        .map(|predicate| {
            let predicate = &predicate["bound_predicate"];
            let of = type_of(&predicate["type"]);
            format!("{of}{}", bounds(": ", &predicate["bounds"]))
        })
        .collect();
    let mut rendered = String::new();
    if !params.is_empty() {
        rendered = format!("<{}>", params.join(", "));
    }
    if !wheres.is_empty() {
        rendered = format!("{rendered} [{}]", wheres.join(", "));
    }
    rendered
}

fn bounds(before: &str, bounds: &Value) -> String {
    let bounds: Vec<_> = list(bounds).map(bound).collect();
    if bounds.is_empty() {
        return String::new();
    }
    format!("{before}{}", bounds.join(" + "))
}

fn bound(bound: &Value) -> String {
    if let Some(one) = bound.get("trait_bound") {
        let maybe = if one["modifier"] == "maybe" { "?" } else { "" };
        return format!("{maybe}{}", path_of(&one["trait"]));
    }
    match bound.get("outlives") {
        Some(lifetime) => text(lifetime),
        None => "use<..>".to_owned(),
    }
}

/// Renders a type in Rust syntax.
fn type_of(described: &Value) -> String {
    let Some((kind, inner)) = described.as_object().and_then(|one| one.iter().next()) else {
        return text(described);
    };
    let all = |types: &Value| -> String {
        let types: Vec<_> = list(types).map(type_of).collect();
        types.join(", ")
    };
    match kind.as_str() {
        "resolved_path" => path_of(inner),
        "generic" | "primitive" => text(inner),
        "borrowed_ref" => {
            let lifetime = match &inner["lifetime"] {
                Value::Null => String::new(),
                lifetime => format!("{} ", text(lifetime)),
            };
            let mutable = if inner["is_mutable"] == true {
                "mut "
            } else {
                ""
            };
            format!("&{lifetime}{mutable}{}", type_of(&inner["type"]))
        }
        "tuple" => format!("({})", all(inner)),
        "slice" => format!("[{}]", type_of(inner)),
        "array" => format!("[{}; {}]", type_of(&inner["type"]), text(&inner["len"])),
        "impl_trait" => format!("impl {}", bounds("", inner)),
        "dyn_trait" => {
            let traits = list(&inner["traits"]).map(|one| path_of(&one["trait"]));
            format!("dyn {}", traits.collect::<Vec<_>>().join(" + "))
        }
        "qualified_path" => {
            format!("{}::{}", type_of(&inner["self_type"]), text(&inner["name"]))
        }
        other => other.to_owned(),
    }
}

fn path_of(path: &Value) -> String {
    let name = text(path.get("path").unwrap_or(&path["name"]));
    let args = &path["args"];
    if let Some(args) = args.get("angle_bracketed") {
        let types = list(&args["args"]).map(|arg| match arg.get("type") {
            Some(of) => type_of(of),
            None => text(arg.get("lifetime").unwrap_or(arg)),
        });
        let constraints = list(&args["constraints"]).map(|constraint| {
            let equals = &constraint["binding"]["equality"]["type"];
            let of = match equals {
                Value::Null => bounds("", &constraint["binding"]["constraint"]),
                equals => type_of(equals),
            };
            format!("{} = {of}", text(&constraint["name"]))
        });
        let all: Vec<_> = types.chain(constraints).collect();
        if all.is_empty() {
            return name;
        }
        return format!("{name}<{}>", all.join(", "));
    }
    if let Some(args) = args.get("parenthesized") {
        let inputs: Vec<_> = list(&args["inputs"]).map(type_of).collect();
        let output = match &args["output"] {
            Value::Null => String::new(),
            output => format!(" -> {}", type_of(output)),
        };
        return format!("{name}({}){output}", inputs.join(", "));
    }
    name
}

fn is_public(item: &Value) -> bool {
    item["visibility"] == "public" || item["visibility"] == "default"
}

fn id(id: &Value) -> String {
    match id {
        Value::String(id) => id.clone(),
        other => other.to_string(),
    }
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
