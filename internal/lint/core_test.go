package lint

import (
	"go/ast"
	"go/token"
	"path"
	"strings"
	"testing"
)

// cores are the folders of single-threaded state machines. Their files, but
// those whose names begin with "shell", hold no goroutine, channel, select or
// clock: events come in through a loop.Loop and effects leave by it, so that
// the simulator runs the same code from a seed.
var cores = []string{"cluster", "cluster/raftgroup", "cluster/seglog", "cluster/index", "cluster/node",
	"cluster/coordinator", "cluster/placement", "cluster/wire", "gateway"}

// timeNames are what a core may use of package time: lengths of time, not the time.
var timeNames = map[string]bool{"Duration": true, "Nanosecond": true, "Microsecond": true, "Millisecond": true,
	"Second": true, "Minute": true, "Hour": true}

func isCore(f *file) bool {
	if f.test || strings.HasPrefix(path.Base(f.path), "shell") {
		return false
	}
	for _, dir := range cores {
		if f.dir == dir {
			return true
		}
	}
	return false
}

func TestCoresAreSingleThreaded(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range repository(t) {
		if !isCore(f) {
			continue
		}
		seen[f.dir] = true
		timeName := f.importName("time")
		for _, banned := range []string{"crypto/rand", "net", "os/exec", "runtime"} {
			if f.importName(banned) != "" {
				t.Errorf("%s: a core imports %s; pass in what it needs or move it to a shell", f.path, banned)
			}
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				t.Errorf("%s: go statement in a core: use the Loop's Do", f.at(n.Pos()))
			case *ast.SelectStmt:
				t.Errorf("%s: select in a core", f.at(n.Pos()))
			case *ast.SendStmt:
				t.Errorf("%s: channel send in a core", f.at(n.Pos()))
			case *ast.ChanType:
				t.Errorf("%s: channel in a core", f.at(n.Pos()))
			case *ast.UnaryExpr:
				if n.Op == token.ARROW {
					t.Errorf("%s: channel receive in a core", f.at(n.Pos()))
				}
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && timeName != "" && x.Name == timeName && !timeNames[n.Sel.Name] {
					t.Errorf("%s: time.%s in a core: use the Loop's Now and After", f.at(n.Pos()), n.Sel.Name)
				}
			}
			return true
		})
	}
	for _, dir := range cores {
		if !seen[dir] {
			t.Errorf("the core folder %s has no source", dir)
		}
	}
}
