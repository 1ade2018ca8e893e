package nbd_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// TestEmbed builds and tests a module of its own that uses these packages.
func TestEmbed(t *testing.T) {
	for _, args := range [][]string{{"vet", "./..."}, {"test", "-count=1", "./..."}} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir = "../test/embed"
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestSurface: what is exported names only types of the standard library and of
// these packages: of internal ones others could not make values.
func TestSurface(t *testing.T) {
	// nbd/device is Firn's own; it shows that the test sees something.
	for _, dir := range []string{".", "wire", "server", "backend", "client", "device"} {
		found := 0
		fset := token.NewFileSet()
		packages, err := parser.ParseDir(fset, dir, func(f os.FileInfo) bool { return !strings.HasSuffix(f.Name(), "_test.go") }, parser.SkipObjectResolution)
		if err != nil || len(packages) != 1 {
			t.Fatalf("%s: %d packages, %v", dir, len(packages), err)
		}
		for _, p := range packages {
			for _, f := range p.Files {
				for _, pos := range internalNames(f) {
					if found++; dir == "device" {
						continue
					}
					t.Errorf("%s: an exported declaration names a type of an internal package or of another module", fset.Position(pos))
				}
			}
		}
		if dir == "device" && found == 0 {
			t.Errorf("the test is blind")
		}
	}
}

// internalNames returns where the exported declarations of a file name what
// embedders cannot.
func internalNames(f *ast.File) (at []token.Pos) {
	foreign := map[string]bool{}
	for _, i := range f.Imports {
		path, _ := strconv.Unquote(i.Path.Value)
		ours := strings.HasPrefix(path, "firn.io/firn/nbd")
		if strings.Contains(path, "/internal/") || !ours && strings.Contains(strings.Split(path, "/")[0], ".") {
			foreign[path[strings.LastIndex(path, "/")+1:]] = true
		}
	}
	look := func(n ast.Node) {
		ast.Inspect(n, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := s.X.(*ast.Ident); ok && foreign[x.Name] {
					at = append(at, s.Pos())
				}
			}
			return true
		})
	}
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && exportedReceiver(d) {
				look(d.Type)
			}
		case *ast.GenDecl:
			for _, s := range d.Specs {
				if s, ok := s.(*ast.TypeSpec); ok && s.Name.IsExported() {
					look(exportedFields(s.Type))
				}
			}
		}
	}
	return at
}

// exportedFields leaves out of a struct what is not exported.
func exportedFields(e ast.Expr) ast.Expr {
	s, ok := e.(*ast.StructType)
	if !ok {
		return e
	}
	kept := &ast.FieldList{}
	for _, f := range s.Fields.List {
		if len(f.Names) == 0 || f.Names[0].IsExported() {
			kept.List = append(kept.List, f)
		}
	}
	return &ast.StructType{Fields: kept}
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	e := d.Recv.List[0].Type
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	name, ok := e.(*ast.Ident)
	return ok && name.IsExported()
}
