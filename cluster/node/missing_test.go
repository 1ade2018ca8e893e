package node_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"firn.io/firn/cluster/node"
)

// TestNodeTellsOfMissingReplicas: a node that comes up with an empty disk says how
// many of the replicas that the cluster gives it are not there, what it serves, and
// in its log what to do.
func TestNodeTellsOfMissingReplicas(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	l.absentAfter = time.Hour
	l.volume("demo", 16<<20)
	m := l.nodes[1]
	l.eventually("all is there", func() bool {
		s, ok := node.Snapshot(m.loop, m.node)
		return ok && s.GivenKnown && s.Given > 0 && s.Missing == 0
	})
	s, _ := node.Snapshot(m.loop, m.node)
	given := s.Given

	m.stop()
	if err := os.RemoveAll(m.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var log strings.Builder
	l.logf = func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(&log, format+"\n", args...)
	}
	m.start()
	l.eventually("the missing are counted", func() bool {
		s, ok := node.Snapshot(m.loop, m.node)
		return ok && s.Given == given && s.Missing == given && s.Registered
	})
	mu.Lock()
	defer mu.Unlock()
	want := fmt.Sprintf("%d of %d replicas that the cluster gives node 2 are not on its disks", given, given)
	if text := log.String(); strings.Count(text, want) != 1 || !strings.Contains(text, "check --disk") {
		t.Errorf("the log lacks %q:\n%s", want, text)
	}
}
