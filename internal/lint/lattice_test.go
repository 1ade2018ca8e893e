package lint

import (
	"sort"
	"strings"
	"testing"
)

// lattice says which packages of Firn the non-test files of a folder may
// import. "x/..." is x and all below it. A folder that is not listed fails, so
// that a new package finds its place here first. Policy, not description: a
// line changes with the architecture, not to make a build pass.
//
//	internal/block < internal/* < leaves (wire, transport, seglog, meta, placement)
//	  < index < raftgroup < node;  leaves < cluster;  internal < gateway, nbd;  all < cmd/firn
var lattice = map[string][]string{
	"internal/block":           {},
	"internal/clock":           {},
	"internal/lint":            {},
	"internal/block/blocktest": {"internal/block"},
	"internal/payload":         {"internal/block"},
	"internal/loop":            {"internal/block", "internal/clock"},
	"internal/vfs":             {"internal/block", "internal/clock"},
	"internal/vfs/vfstest":     {"internal/block", "internal/vfs"},
	"internal/vfs/pebblefs":    {"internal/block", "internal/vfs"},

	"cluster/wire":            {"internal/..."},
	"cluster/transport":       {"internal/..."},
	"cluster/transport/...":   {"internal/...", "cluster/transport/..."},
	"cluster/seglog":          {"internal/..."},
	"cluster/seglog/...":      {"internal/...", "cluster/seglog"},
	"cluster/index":           {"internal/...", "cluster/wire", "cluster/seglog"},
	"cluster/index/...":       {"internal/...", "cluster/index", "cluster/wire", "cluster/seglog"},
	"cluster/raftgroup":       {"internal/...", "cluster/wire", "cluster/transport"},
	"cluster/meta":            {"internal/..."},
	"cluster/meta/...":        {"internal/...", "cluster/meta"},
	"cluster/placement":       {"internal/block"},
	"cluster/coordinator":     {"internal/...", "cluster/meta", "cluster/placement"},
	"cluster/coordinator/...": {"internal/...", "cluster/meta", "cluster/placement", "cluster/coordinator"},
	"cluster/node": {"internal/...", "cluster/wire", "cluster/transport", "cluster/seglog", "cluster/index",
		"cluster/raftgroup", "cluster/meta", "cluster/placement", "cluster/coordinator"},
	"cluster":           {"internal/...", "cluster/wire", "cluster/transport", "cluster/meta", "cluster/placement"},
	"cluster/clusterpb": {},

	"gateway":    {"internal/..."},
	"nbd":        {"internal/...", "nbd/wire"},
	"nbd/wire":   {},
	"nbd/client": {"internal/...", "nbd/wire"},
	"nbd/...":    {"internal/...", "nbd", "nbd/wire", "nbd/client"},

	"iscsi":      {"internal/...", "iscsi/pdu", "iscsi/scsi"},
	"iscsi/pdu":  {},
	"iscsi/scsi": {"internal/..."},
	"iscsi/...":  {"internal/...", "iscsi", "iscsi/pdu", "iscsi/scsi"},

	"deploy/etcd": {},

	"cmd/firn": {"internal/...", "cluster/...", "gateway", "nbd/...", "iscsi/..."},
	"test/...": {"internal/...", "cluster/...", "gateway", "nbd/...", "iscsi/...", "test/..."},
	"bench":    {"internal/...", "cluster/...", "gateway", "nbd/...", "iscsi/...", "test/..."},
}

// frontends and storage must not know one another, tests included: what joins
// them is cmd/firn, test/ and bench/.
var strangers = []string{"nbd", "iscsi", "cache", "cluster", "tier"}

// owners names the only folders that may import a module of others, so that it
// can be replaced in one place.
var owners = map[string][]string{
	"go.etcd.io/raft/v3":                {"cluster/raftgroup"},
	"go.etcd.io/etcd/client/v3":         {"cluster/meta"},
	"go.etcd.io/etcd/api/v3":            {"cluster/meta"},
	"go.etcd.io/etcd/server/v3":         {"cmd/firn", "cluster/meta", "deploy/etcd"},
	"github.com/cockroachdb/pebble":     {"cluster/index/pebblestore", "internal/vfs/pebblefs"},
	"github.com/spf13/cobra":            {"cmd/firn"},
	"github.com/spf13/pflag":            {"cmd/firn"},
	"github.com/prometheus":             {"cmd/firn"},
	"gopkg.in/yaml.v3":                  {"cmd/firn"},
	"google.golang.org/grpc":            {"cluster/transport", "cluster/clusterpb", "cmd/firn", "cluster/meta"},
	"google.golang.org/protobuf":        {"cluster/clusterpb", "cmd/firn", "cluster/raftgroup"},
	"github.com/anishathalye/porcupine": {"test", "cluster", "gateway"},
}

func repository(t *testing.T) []*file {
	t.Helper()
	dir, err := root()
	if err != nil {
		t.Fatal(err)
	}
	files, err := load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("only %d Go files below %s", len(files), dir)
	}
	return files
}

func matches(pattern, dir string) bool {
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return dir == base || strings.HasPrefix(dir, base+"/")
	}
	return pattern == dir
}

// ruleFor returns the most exact line of the lattice for dir.
func ruleFor(dir string) ([]string, bool) {
	if rule, ok := lattice[dir]; ok {
		return rule, true
	}
	best, found := "", false
	for pattern := range lattice {
		if matches(pattern, dir) && len(pattern) > len(best) {
			best, found = pattern, true
		}
	}
	return lattice[best], found
}

func TestImportLattice(t *testing.T) {
	for _, f := range repository(t) {
		rule, known := ruleFor(f.dir)
		if !known {
			t.Errorf("%s: folder %s has no place in the lattice of internal/lint", f.path, f.dir)
			continue
		}
		for _, imported := range f.imports() {
			dir, ours := strings.CutPrefix(imported, Module+"/")
			if !ours {
				continue
			}
			if top(f.dir) != top(dir) && isStranger(f.dir) && isStranger(dir) {
				t.Errorf("%s: %s and %s must not import one another", f.path, top(f.dir), top(dir))
			}
			if f.test || dir == f.dir {
				continue
			}
			allowed := false
			for _, pattern := range rule {
				allowed = allowed || matches(pattern, dir)
			}
			if !allowed {
				t.Errorf("%s: %s may not import %s", f.path, f.dir, dir)
			}
		}
	}
}

func top(dir string) string {
	first, _, _ := strings.Cut(dir, "/")
	return first
}

func isStranger(dir string) bool {
	for _, s := range strangers {
		if top(dir) == s {
			return true
		}
	}
	return false
}

func TestForeignModulesHaveOneOwner(t *testing.T) {
	for _, f := range repository(t) {
		for _, imported := range f.imports() {
			for module, dirs := range owners {
				if imported != module && !strings.HasPrefix(imported, module+"/") {
					continue
				}
				allowed := false
				for _, dir := range dirs {
					allowed = allowed || matches(dir+"/...", f.dir)
				}
				if !allowed && !(f.test && strings.HasPrefix(f.dir, "test/")) {
					t.Errorf("%s: only %s may import %s", f.path, strings.Join(dirs, ", "), module)
				}
			}
		}
	}
}

// TestEveryPackageIsUsed finds parts that nobody wired: each package that is
// not a command or a test is imported by a file outside of it.
func TestEveryPackageIsUsed(t *testing.T) {
	used := map[string]bool{}
	packages := map[string]bool{}
	for _, f := range repository(t) {
		if !f.test && f.ast.Name.Name != "main" {
			packages[f.dir] = true
		}
		for _, imported := range f.imports() {
			if dir, ok := strings.CutPrefix(imported, Module+"/"); ok && dir != f.dir {
				used[dir] = true
			}
		}
	}
	var dead []string
	for dir := range packages {
		if !used[dir] && dir != "internal/lint" && top(dir) != "test" && dir != "bench" {
			dead = append(dead, dir)
		}
	}
	sort.Strings(dead)
	for _, dir := range dead {
		t.Errorf("nobody imports %s: wire it or remove it", dir)
	}
}

func TestNoVaguePackages(t *testing.T) {
	for _, f := range repository(t) {
		for _, part := range strings.Split(f.dir, "/") {
			switch part {
			case "util", "utils", "common", "helper", "helpers", "misc", "shared", "types", "manager", "pkg":
				t.Errorf("%s: a package called %q says nothing; name what it holds", f.path, part)
			}
		}
	}
}
