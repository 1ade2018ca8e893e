package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"firn.io/firn/test/stamp"
)

// TestTwoNodesWithOneID: the second process of a node's id ends with what, why and
// what to do, and the first goes on.
func TestTwoNodesWithOneID(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, etcd := startEtcd(t, filepath.Join(dir, "etcd"))
	args := func(disk string) []string {
		return []string{"node", "--json", "--id", "1", "--disk", filepath.Join(dir, disk), "--etcd", etcd, "--listen", freeAddr(t), "--http", freeAddr(t)}
	}
	serve(t, args("disk"))
	gateway := serve(t, []string{"gateway", "--json", "--id", "gw1", "--data", filepath.Join(dir, "gw1"), "--etcd", etcd,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	gateway.firn("volume", "create", "v", "1G")
	m := mib{stamp.NewHistory([16]byte{}), roam(t, "v", gateway.NBD)}
	for i, tc := range []struct{ disk, why, act string }{
		{"other", "node 1 is running already", "give this one another"},
		{"disk", "in use by another process", ""},
	} {
		got := try(t, firnBinary, args(tc.disk)...)
		said := got.stdout + got.stderr
		if got.exit != 5 || !strings.Contains(said, tc.why) || !strings.Contains(said, tc.act) {
			t.Errorf("a second process on %s: exit %d\n%s", tc.disk, got.exit, said)
		}
		if err := m.write(t.Context(), int64(i)); err != nil {
			t.Fatal(err)
		}
		if err := m.check(t.Context(), int64(i)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDiskTakenAway: one of the two disks of a node is removed while the cluster
// serves. Nothing is lost, the node goes on with the other one, says what happened,
// and does not make the disk anew at its next start.
func TestDiskTakenAway(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c := &cluster{t: t, dir: t.TempDir()}
	c.etcd, c.etcdURL = startEtcd(t, filepath.Join(c.dir, "etcd"))
	var gone string
	for i := range c.nodes {
		a, b := filepath.Join(c.dir, fmt.Sprintf("disk%da", i+1)), filepath.Join(c.dir, fmt.Sprintf("disk%db", i+1))
		gone = a
		c.args[i] = []string{"node", "--json", "--id", fmt.Sprint(i + 1), "--disk", a + "=1G", "--disk", b + "=1G", "--etcd", c.etcdURL, "--listen", freeAddr(t), "--http", freeAddr(t)}
		c.startNode(i)
	}
	c.gateway = serve(t, []string{"gateway", "--json", "--id", "gw1", "--data", filepath.Join(c.dir, "gw1"), "--etcd", c.etcdURL,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	c.gateway.firn("volume", "create", "v", "1G")
	m := mib{stamp.NewHistory([16]byte{}), roam(t, "v", c.gateway.NBD)}
	for i := range int64(32) {
		if err := m.write(ctx, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(gone); err != nil {
		t.Fatal(err)
	}
	awaitTrue(t, "the disk is known to be gone", func() bool {
		return strings.Contains(c.gateway.firn("status"), "gone while it was in use")
	})
	for i := range int64(48) {
		if err := m.write(ctx, i); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.nodes[2].stop(); err != nil {
		t.Errorf("stop: %v\n%s", err, lastLines(c.nodes[2].stderr.String()))
	}
	c.startNode(2)
	c.awaitCaughtUp(2)
	if _, err := os.Stat(gone); !os.IsNotExist(err) {
		t.Errorf("the folder was made anew: %v", err)
	}
	c.nodes[0].kill()
	for i := range int64(48) {
		if err := m.check(ctx, i); err != nil {
			t.Fatalf("MiB %d: %v", i, err)
		}
	}
}
