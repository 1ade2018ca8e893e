// Package guest boots a stock Debian kernel in QEMU (emulated: no KVM is needed
// or used) and runs commands in it, so that tests can use what only a kernel
// has: its NBD and iSCSI initiators, file systems over them, multipath.
//
// The guest's root is an initial RAM file system of busybox and of whatever
// programs of the host the test names. In the guest the host's loopback is
// 10.0.2.2. The guest ends with the test, or with the test's process.
package guest

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"firn.io/firn/test/guest/agent/line"
)

// HostAddr is where a guest reaches the host's loopback.
const HostAddr = "10.0.2.2"

// Config says what is in a guest.
type Config struct {
	// Programs of the host, by name, with the libraries that they need.
	Programs []string
	// Files of the host by their path in the guest. Programs among them bring
	// their libraries.
	Files map[string]string
	// Texts are further files by their path in the guest.
	Texts map[string]string
	// Links are symbolic links by their path in the guest.
	Links map[string]string
	// Init is the first process once all is set up, /bin/init of busybox if empty.
	Init string
	// Modules are there for modprobe, with what they depend on.
	Modules []string
	// MemoryMiB is 768 if zero, CPUs 2.
	MemoryMiB, CPUs int
	// Disks are images that are seen as /dev/vda, /dev/vdb, ...
	Disks []string
	// Append is added to the kernel's command line.
	Append string
}

// quiet is how long a guest may be without any sign of life, and a command
// without printing anything.
const quiet = 60 * time.Second

// Guest is a running guest.
type Guest struct {
	t       testing.TB
	cmd     *exec.Cmd
	console *console
	port    net.Conn
	// ready is closed when commands can be run, exited when QEMU has ended.
	ready, exited chan struct{}
	work          *work
}

// work is what runs in a guest.
type work struct {
	mu      sync.Mutex
	lastID  int
	running map[int]*Running
}

// With returns the same guest for a subtest, whose failures are then its own.
func (g *Guest) With(t testing.TB) *Guest {
	sub := *g
	sub.t = t
	return &sub
}

// Running is a command in work.
type Running struct {
	g      *Guest
	script string
	// told is sent to when the command printed or ended.
	told chan struct{}

	mu     sync.Mutex
	output bytes.Buffer
	ended  bool
	exit   int
}

// console keeps what the kernel and the guest's first process print.
type console struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *console) tail(lines int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := strings.Split(strings.TrimSpace(c.text.String()), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// always is in every guest.
var alwaysModules = []string{"virtio_pci", "virtio_net", "virtio_console", "virtio_blk"}

const initScript = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /run /tmp /mnt
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
ulimit -c 0
for m in virtio_pci virtio_net virtio_console virtio_blk; do modprobe $m || echo "init: no module $m"; done
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2
mkdir -p /dev/virtio-ports
n=0
while [ ! -e /dev/virtio-ports/agent ]; do
	for p in /sys/class/virtio-ports/*; do
		[ "$(cat $p/name 2>/dev/null)" = agent ] && ln -sf /dev/${p##*/} /dev/virtio-ports/agent
	done
	n=$((n+1)); [ $n -gt 200 ] && echo "init: no port of the host" && break
	[ -e /dev/virtio-ports/agent ] || usleep 20000
done
exec INIT
`

const inittab = `::once:/agent
::ctrlaltdel:/bin/true
`

// Boot starts a guest and returns when it takes commands.
func Boot(t testing.TB, cfg Config) *Guest {
	t.Helper()
	dir := t.TempDir()
	start := time.Now()
	k, err := findKernel()
	if err != nil {
		t.Fatal(err)
	}
	ramdisk := filepath.Join(dir, "initramfs")
	if err := makeRoot(k, cfg, dir, ramdisk); err != nil {
		t.Fatal(err)
	}
	g := &Guest{t: t, console: &console{}, ready: make(chan struct{}), exited: make(chan struct{}), work: &work{running: map[int]*Running{}}}
	g.start(k, cfg, ramdisk, filepath.Join(dir, "agent"))
	timeout := time.NewTimer(quiet)
	defer timeout.Stop()
	select {
	case <-g.ready:
	case <-g.exited:
		t.Fatalf("the guest ended before it was up:\n%s", g.console.tail(60))
	case <-timeout.C:
		t.Fatalf("the guest is not up after %v:\n%s", quiet, g.console.tail(60))
	}
	t.Logf("measured: a guest with kernel %s is up after %.1f s", k.version, time.Since(start).Seconds())
	return g
}

func makeRoot(k *kernel, cfg Config, dir, to string) error {
	agent := filepath.Join(dir, "agent-binary")
	build := exec.Command("go", "build", "-o", agent, "firn.io/firn/test/guest/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	a := newArchive()
	for _, name := range []string{"proc", "sys", "dev", "tmp", "run", "mnt", "root", "var/lib", "bin", "sbin"} {
		a.dir(name)
	}
	a.link("usr/bin", "../bin")
	a.link("usr/sbin", "../bin")
	a.link("var/run", "../run")
	a.text("init", strings.Replace(initScript, "INIT", cmp.Or(cfg.Init, "/bin/init"), 1))
	a.text("etc/inittab", inittab)
	a.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
	a.text("etc/group", "root:x:0:\n")
	a.text("etc/hosts", "127.0.0.1 localhost\n")
	a.link("etc/mtab", "/proc/self/mounts")
	for name, text := range cfg.Texts {
		a.text(name, text)
	}
	for name, target := range cfg.Links {
		a.link(name, target)
	}
	if err := a.file("agent", agent); err != nil {
		return err
	}
	for name, at := range cfg.Files {
		if err := a.executable(name, at); err != nil {
			return err
		}
	}
	for _, name := range append([]string{"busybox"}, cfg.Programs...) {
		if err := a.program(name); err != nil {
			return err
		}
	}
	if err := k.addModules(a, append(append([]string{}, alwaysModules...), cfg.Modules...)); err != nil {
		return err
	}
	return a.write(to)
}

func orElse(n, otherwise int) string {
	if n == 0 {
		n = otherwise
	}
	return strconv.Itoa(n)
}

// start launches QEMU and connects to the agent's port.
func (g *Guest) start(k *kernel, cfg Config, ramdisk, socket string) {
	g.t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		g.t.Fatal(err)
	}
	defer listener.Close()
	args := []string{
		"-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off",
		"-m", orElse(cfg.MemoryMiB, 768), "-smp", orElse(cfg.CPUs, 2),
		"-kernel", k.image(), "-initrd", ramdisk,
		"-append", strings.TrimSpace("console=ttyS0 panic=1 oops=panic mitigations=off quiet loglevel=4 " + cfg.Append),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,path=" + socket,
		"-device", "virtserialport,chardev=agent,name=agent",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
	}
	for i, disk := range cfg.Disks {
		args = append(args, "-drive", fmt.Sprintf("if=none,format=raw,id=disk%d,file=%s", i, disk),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	g.cmd = exec.Command("qemu-system-x86_64", args...)
	g.cmd.Stdout, g.cmd.Stderr = g.console, g.console
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The death signal is of the thread that started it.
		runtime.LockOSThread()
		err := g.cmd.Start()
		started <- err
		if err == nil {
			g.cmd.Wait()
			close(g.exited)
		}
	}()
	if err := <-started; err != nil {
		g.t.Fatalf("start qemu-system-x86_64: %v", err)
	}
	g.t.Cleanup(g.Kill)
	if err := listener.(*net.UnixListener).SetDeadline(time.Now().Add(quiet)); err != nil {
		g.t.Fatal(err)
	}
	if g.port, err = listener.Accept(); err != nil {
		g.t.Fatalf("QEMU does not connect: %v\n%s", err, g.console.tail(20))
	}
	received := make(chan struct{})
	go func() {
		defer close(received)
		g.receive()
	}()
	g.t.Cleanup(func() {
		g.port.Close()
		<-received
	})
}

// receive gives each answer to its command until the guest is gone.
func (g *Guest) receive() {
	in := bufio.NewScanner(g.port)
	in.Buffer(nil, line.MaxBytes)
	for in.Scan() {
		var a line.Answer
		if json.Unmarshal(in.Bytes(), &a) != nil {
			continue
		}
		if a.Ready {
			close(g.ready)
			continue
		}
		g.work.mu.Lock()
		r := g.work.running[a.ID]
		if a.Ended {
			delete(g.work.running, a.ID)
		}
		g.work.mu.Unlock()
		if r != nil {
			r.take(a)
		}
	}
}

func (r *Running) take(a line.Answer) {
	r.mu.Lock()
	r.output.WriteString(a.Output)
	if a.Ended {
		r.ended, r.exit = true, a.Exit
	}
	r.mu.Unlock()
	select {
	case r.told <- struct{}{}:
	default:
	}
}

// Kill ends the guest at once, as a power cut does.
func (g *Guest) Kill() {
	syscall.Kill(-g.cmd.Process.Pid, syscall.SIGKILL)
	<-g.exited
}

// Console returns the last lines of what the kernel printed.
func (g *Guest) Console(lines int) string { return g.console.tail(lines) }

// Start begins a shell script and does not wait for it.
func (g *Guest) Start(script string) *Running {
	g.t.Helper()
	g.work.mu.Lock()
	g.work.lastID++
	id := g.work.lastID
	r := &Running{g: g, script: script, told: make(chan struct{}, 1)}
	g.work.running[id] = r
	text, err := json.Marshal(line.Command{ID: id, Script: script})
	if err == nil {
		_, err = g.port.Write(append(text, '\n'))
	}
	g.work.mu.Unlock()
	if err != nil {
		g.t.Fatalf("ask the guest to run %q: %v\n%s", script, err, g.console.tail(40))
	}
	return r
}

// errQuiet ends the wait for a command that shows no progress.
var errQuiet = errors.New("no progress")

// wait returns when done says so, and fails if nothing is printed for too long.
func (r *Running) wait(limit time.Duration, done func() bool) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		r.mu.Lock()
		finished, ended := done(), r.ended
		r.mu.Unlock()
		if finished {
			return nil
		}
		if ended {
			return fmt.Errorf("it ended with %d", r.exit)
		}
		select {
		case <-r.told:
			timer.Reset(limit)
		case <-r.g.exited:
			return errors.New("the guest ended")
		case <-timer.C:
			return fmt.Errorf("%w for %v", errQuiet, limit)
		}
	}
}

// Await returns once the command has printed text.
func (r *Running) Await(text string) {
	r.g.t.Helper()
	err := r.wait(quiet, func() bool { return bytes.Contains(r.output.Bytes(), []byte(text)) })
	if err != nil {
		r.g.t.Fatalf("guest: %s: it did not print %q: %v\n%s\nconsole:\n%s", r.script, text, err, r.Output(), r.g.console.tail(40))
	}
}

// Wait returns the output and the exit status when the command has ended. A
// command that prints nothing for a minute fails the test.
func (r *Running) Wait() (string, int) {
	r.g.t.Helper()
	if err := r.wait(quiet, func() bool { return r.ended }); err != nil {
		r.g.t.Fatalf("guest: %s: %v\n%s\nconsole:\n%s", r.script, err, r.Output(), r.g.console.tail(40))
	}
	return r.Output(), r.exit
}

// Ended tells whether the command has ended.
func (r *Running) Ended() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ended
}

// Output returns what the command has printed so far, on both outputs.
func (r *Running) Output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.output.String()
}

// OK waits for a command that must succeed and returns its output.
func (r *Running) OK() string {
	r.g.t.Helper()
	out, exit := r.Wait()
	if exit != 0 {
		r.g.t.Fatalf("guest: %s: exit %d\n%s\nconsole:\n%s", r.script, exit, out, r.g.console.tail(40))
	}
	return out
}

// Try runs a script to its end and returns its output and exit status.
func (g *Guest) Try(script string) (string, int) {
	g.t.Helper()
	return g.Start(script).Wait()
}

// Run runs a script that must succeed and returns its output, both outputs in
// one, without the last line's end.
func (g *Guest) Run(script string) string {
	g.t.Helper()
	return strings.TrimRight(g.Start("set -e; "+script).OK(), "\n")
}
