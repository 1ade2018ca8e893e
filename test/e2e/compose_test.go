package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"firn.io/firn/test/stamp"
)

// startEngine makes sure that a container engine answers: one that runs, or one
// that is started here and stopped after the test.
func startEngine(t testing.TB) {
	t.Helper()
	const install = "install them: apt-get install docker.io docker-compose"
	for _, program := range []string{"docker", "docker-compose"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("%v; %s", err, install)
		}
	}
	answers := func() bool { return try(t, "docker", "info").exit == 0 }
	if answers() {
		return
	}
	if _, err := exec.LookPath("dockerd"); err != nil {
		t.Fatalf("no container engine answers and none can be started: %v; %s", err, install)
	}
	engine := launch(t, "dockerd")
	t.Cleanup(func() { _ = engine.stop() }) // in good order, before launch's own kill
	awaitTrue(t, "the container engine to answer", func() bool {
		select {
		case <-engine.exited:
			t.Fatalf("dockerd cannot be started here (%v):\n%s\nstart a container engine, or %s", engine.err, lastLines(engine.stderr.String()), install)
		default:
		}
		return answers()
	})
}

// composition is what docker-compose.yml starts, from images that were built of
// this source, under names of its own.
type composition struct {
	t       testing.TB
	dir     string
	project string
	nbd     string
}

// compose runs docker-compose in the composition's folder.
func (c *composition) compose(args ...string) string {
	c.t.Helper()
	return run(c.t, "docker-compose", append([]string{"--project-name", c.project, "--project-directory", c.dir, "--file", filepath.Join(c.dir, "docker-compose.yml")}, args...)...)
}

// startComposition copies what `make images` uses to a folder of its own, builds
// there and starts everything.
func startComposition(t *testing.T) *composition {
	t.Helper()
	startEngine(t)
	root := filepath.Join("..", "..")
	c := &composition{t: t, dir: t.TempDir(), project: fmt.Sprintf("firn-e2e-%d", os.Getpid())}
	if err := os.MkdirAll(filepath.Join(c.dir, "dist", "empty"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Dockerfile", "docker-compose.yml", ".dockerignore"} {
		text, err := os.ReadFile(filepath.Join(root, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(c.dir, name), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CGO_ENABLED", "0")
	for name, pkg := range map[string]string{"firn": "./cmd/firn", "etcd": "./deploy/etcd"} {
		run(t, "go", "build", "-C", root, "-ldflags", "-s -w", "-o", filepath.Join(c.dir, "dist", name), pkg)
	}
	c.nbd = freeAddr(t)
	for name, addr := range map[string]string{"FIRN_NBD_PORT": c.nbd, "FIRN_API_PORT": freeAddr(t), "FIRN_HTTP_PORT": freeAddr(t)} {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv(name, port)
	}
	t.Setenv("FIRN_IMAGE", c.project)
	t.Setenv("FIRN_ETCD_IMAGE", c.project+"-etcd")
	t.Setenv("FIRN_CAPACITY", "4G")
	t.Setenv("DOCKER_BUILDKIT", "0")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s", lastLines(try(t, "docker-compose", "--project-name", c.project, "--project-directory", c.dir, "--file", filepath.Join(c.dir, "docker-compose.yml"), "logs", "--no-color").stdout))
		}
		c.compose("down", "--volumes", "--rmi", "all", "--timeout", "20")
		if left := run(t, "docker", "ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project="+c.project); left != "" {
			t.Errorf("containers are left: %s", left)
		}
	})
	c.compose("build", "--quiet")
	c.compose("up", "--detach")
	return c
}

// container is the id of a service's container.
func (c *composition) container(service string) string {
	c.t.Helper()
	return strings.TrimSpace(c.compose("ps", "--quiet", service))
}

func (c *composition) firn(args ...string) result {
	return try(c.t, "docker", append([]string{"exec", c.container("gateway"), "/firn"}, args...)...)
}

// TestComposition is docker-compose.yml as a newcomer uses it, with the loss of
// a node and of the gateway.
func TestComposition(t *testing.T) {
	c := startComposition(t)
	awaitTrue(t, "three nodes", func() bool { return strings.Count(c.firn("node", "ls").stdout, " up ") == 3 })
	if r := c.firn("volume", "create", "v", "256M"); r.exit != 0 {
		t.Fatalf("create: exit %d, %s", r.exit, r.stderr)
	}
	if out := c.firn("volume", "show", "v").stdout; !strings.Contains(out, "replicas      3") {
		t.Errorf("show:\n%s", out)
	}
	uri := "nbd://" + c.nbd + "/v"
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 0xab 200M 1M", "-c", "write -P 0xcd 512 512", "-c", "read -P 0xab 200M 1M", uri)
	dir := t.TempDir()
	image(t, dir+"/in.img", 64<<20, 9)

	const sectors = 32 << 20 / stamp.SectorBytes
	load := stamp.NewLoad(stamp.Options{Seed: 11, Sectors: sectors, Workers: 8, MaxSectors: 64, ReadPercent: 40, TrimPercent: 5, ErrorsEnd: true})
	if r := c.firn("volume", "create", "load", "64M"); r.exit != 0 {
		t.Fatalf("create: exit %d, %s", r.exit, r.stderr)
	}
	dev := dialVolume(t, c.nbd, "load", 2)
	stop := background(load, dev)
	awaitOperations(t, load, 200)
	node := c.container("node2")
	load.ResetStall()
	run(t, "docker", "kill", "--signal", "KILL", node)
	awaitOperations(t, load, load.Operations()+500)
	run(t, "nbdcopy", dir+"/in.img", uri)
	measured(t, "a node's container killed: longest operation %.2f s (aim: at most 3 s)", load.LongestStall().Seconds())
	run(t, "docker", "start", node)
	if err := stop(); err != nil {
		t.Fatalf("the load: %v", err)
	}
	checkAll(t, dev, load, sectors)
	dev.abort()
	awaitTrue(t, "three nodes", func() bool { return strings.Count(c.firn("node", "ls").stdout, " up ") == 3 })

	// The gateway's container dies and comes back with the same folder.
	begin := time.Now()
	gateway := c.container("gateway")
	run(t, "docker", "kill", "--signal", "KILL", gateway)
	run(t, "docker", "start", gateway)
	awaitTrue(t, "the gateway", func() bool { return try(t, "nbdinfo", "--size", uri).exit == 0 })
	measured(t, "the gateway's container killed and started again: %.1f s until it serves", time.Since(begin).Seconds())
	run(t, "nbdcopy", uri, dir+"/out.img")
	run(t, "cmp", "-n", fmt.Sprint(64<<20), dir+"/in.img", dir+"/out.img")
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 0xab 200M 1M", uri)
	checkAll(t, dialVolume(t, c.nbd, "load", 1), load, sectors)
	if r := c.firn("health"); r.exit != 0 {
		t.Errorf("health: %s%s", r.stdout, r.stderr)
	}
}
