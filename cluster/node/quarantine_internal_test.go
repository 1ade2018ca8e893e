package node

import (
	"bytes"
	"maps"
	"strings"
	"testing"

	"firn.io/firn/cluster/seglog"
)

func TestQuarantineFile(t *testing.T) {
	q := quarantined{list: map[seglog.ReplicaKey]string{
		{Group: 7, Replica: 2}:  "its log is damaged: entries up to 12 are missing",
		{Group: 3, Replica: 11}: "two\nlines",
		{Group: 3, Replica: 4}:  strings.Repeat("x", 2*maxReasonBytes),
	}}
	p := q.encode()
	back := quarantined{list: map[seglog.ReplicaKey]string{}}
	if err := back.decode(p); err != nil || len(back.list) != 3 || back.list[seglog.ReplicaKey{Group: 3, Replica: 11}] != "two lines" {
		t.Fatalf("%q: %v, %v", p, back.list, err)
	}
	for _, bad := range []string{"7\n", "7 2\n", "0 2: x\n", "7 0: x\n", "7 -1: x\n", "a b: x\n", ": x\n", "7 2 3: x\n"} {
		if err := back.decode([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func FuzzQuarantineFile(f *testing.F) {
	f.Add([]byte("7 2: its log is damaged\n9 1: x\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		q := quarantined{list: map[seglog.ReplicaKey]string{}}
		if q.decode(p) != nil {
			return
		}
		again := quarantined{list: map[seglog.ReplicaKey]string{}}
		once := q.encode()
		if err := again.decode(once); err != nil || !maps.Equal(keysOf(again.list), keysOf(q.list)) || !bytes.Equal(again.encode(), once) {
			t.Fatalf("%q becomes %q: %v", p, once, err)
		}
	})
}

func keysOf(m map[seglog.ReplicaKey]string) map[seglog.ReplicaKey]bool {
	out := map[seglog.ReplicaKey]bool{}
	for k := range m {
		out[k] = true
	}
	return out
}
