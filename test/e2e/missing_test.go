package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"firn.io/firn/nbd/client"
)

// TestMissingReplicas: a node that comes up with an empty disk is not ready and
// the cluster not healthy; without another node there is no majority, and clients
// are told so instead of left hanging.
func TestMissingReplicas(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	c.gateway.firn("volume", "create", "v", "64M")
	for i := range c.nodes {
		c.awaitCaughtUp(i)
	}
	health := func() result { return try(t, firnBinary, "health", "--api", c.gateway.API) }
	awaitTrue(t, "a healthy cluster", func() bool { return health().exit == 0 })
	c.refuseTwins()

	if err := c.nodes[1].stop(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(c.dir, "node2")
	if err := errors.Join(os.Rename(dir, dir+".unmounted"), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	c.startNode(1)
	web := "http://" + c.args[1][slices.Index(c.args[1], "--http")+1] + "/readyz"
	awaitTrue(t, "the node to tell what it lacks", func() bool {
		code, body := httpGet(web)
		return code == 503 && strings.Contains(body, "replicas that the cluster gives this node are not on its disks")
	})
	c.nodes[1].await(c.nodes[1].stderr, "check --disk")
	if r := health(); r.exit != 1 || !strings.Contains(r.stdout, "groups are degraded, 0 have no majority") || !strings.Contains(r.stdout, "not healthy: ") {
		t.Errorf("health with an empty disk: exit %d\n%s", r.exit, r.stdout)
	}
	if r := try(t, firnBinary, "status", "--api", c.gateway.API); r.exit != 0 || !strings.Contains(r.stdout, "are missing") || !strings.Contains(r.stdout, "not healthy: ") {
		t.Errorf("status with an empty disk: exit %d\n%s", r.exit, r.stdout)
	}

	c.nodes[2].kill()
	awaitTrue(t, "health to see that the majority is lost", func() bool { return strings.Contains(health().stdout, "I/O to their chunks waits") })
	awaitTrue(t, "the gateway not to be ready", func() bool {
		code, body := httpGet("http://" + c.gateway.HTTP + "/readyz")
		return code == 503 && strings.Contains(body, "no majority")
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	begin := time.Now()
	_, err := client.Dial(ctx, c.gateway.NBD, client.Options{Export: "v"})
	if err == nil || !strings.Contains(err.Error(), "no majority") {
		t.Errorf("a client without a majority is told %v", err)
	}
	measured(t, "a client without a majority was told after %.1f s", time.Since(begin).Seconds())
	c.gateway.await(c.gateway.stderr, "volume cannot be attached")
}

// refuseTwins starts processes with the ids of live ones: they end soon, without a
// flood of log lines, and the way out of what they left is named.
func (c *cluster) refuseTwins() {
	t := c.t
	t.Helper()
	disk := filepath.Join(c.dir, "twin")
	var wait sync.WaitGroup
	for _, args := range [][]string{
		{"node", "--id", "1", "--disk", disk + "=20G", "--etcd", c.etcdURL, "--listen", freeAddr(t), "--http", ""},
		{"gateway", "--id", "gw1", "--data", disk + "-gw", "--etcd", c.etcdURL, "--nbd", freeAddr(t), "--api", freeAddr(t), "--http", ""},
	} {
		wait.Go(func() {
			begin := time.Now()
			r := try(t, firnBinary, args...)
			if lines := strings.Count(r.stderr, "\n"); r.exit != 5 || !strings.Contains(r.stderr, "is running already") || lines > 10 || time.Since(begin) > time.Minute {
				t.Errorf("a second %s: exit %d after %v, %d lines:\n%s", args[0], r.exit, time.Since(begin), lines, r.stderr)
			}
		})
	}
	wait.Wait()
	r := try(t, firnBinary, "node", "--id", "9", "--disk", disk+"=20G", "--etcd", c.etcdURL, "--listen", freeAddr(t), "--http", "")
	if r.exit != 12 || !strings.Contains(r.stderr, "start it with --id 1") {
		t.Errorf("another node's folder: exit %d, %s", r.exit, r.stderr)
	}
}
