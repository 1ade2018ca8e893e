package guest

import (
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
)

// kernel is an unpacked Debian kernel package.
type kernel struct {
	// root holds boot/ and lib/modules/.
	root, version string
	// modules are the files of modules by name, with _ for -.
	modules map[string]string
}

// kernelPackage is Debian's name of the kernel for virtual machines of the
// release that is installed.
const kernelPackage = "linux-image-cloud-amd64"

// findKernel returns the kernel in the cache of this user, or fetches it there:
// nothing is installed.
func findKernel() (*kernel, error) {
	root, err := findPackage(kernelPackage)
	if err != nil {
		return nil, err
	}
	return openKernel(root)
}

// findPackage returns the folder of what a package of Debian's holds; of the
// kernel, of what the package depends on.
func findPackage(name string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = filepath.Join(os.TempDir(), fmt.Sprintf("cache-%d", os.Getuid()))
	}
	dir := filepath.Join(cache, "firn-guest")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	root := filepath.Join(dir, name)
	if name == kernelPackage {
		root = filepath.Join(dir, "kernel")
	}
	if _, err := os.Stat(root); err != nil {
		err := fetchPackage(dir, name, root)
		if err != nil && exec.Command("apt-get", "update").Run() == nil {
			err = fetchPackage(dir, name, root) // the machine's lists were missing, or old
		}
		if err != nil {
			return "", fmt.Errorf("fetch the package %s: %w", name, err)
		}
	}
	return root, nil
}

var dependsOnImage = regexp.MustCompile(`Depends: (linux-image-\S+)`)

// imagePackage is the package with the kernel itself.
func imagePackage() (string, error) {
	out, err := exec.Command("apt-cache", "depends", kernelPackage).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("apt-cache: %w\n%s", err, out)
	}
	found := dependsOnImage.FindSubmatch(out)
	if found == nil {
		return "", fmt.Errorf("apt-cache names no image:\n%s", out)
	}
	return string(found[1]), nil
}

func fetchPackage(dir, name, root string) error {
	if name == kernelPackage {
		var err error
		if name, err = imagePackage(); err != nil {
			return err
		}
	}
	work, err := os.MkdirTemp(dir, "fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	get := exec.Command("apt-get", "-o", "APT::Sandbox::User=root", "download", name)
	get.Dir = work
	if out, err := get.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download: %w\n%s", err, out)
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get left %d packages: %v", len(debs), err)
	}
	unpacked := filepath.Join(work, "root")
	if out, err := exec.Command("dpkg", "-x", debs[0], unpacked).CombinedOutput(); err != nil {
		return fmt.Errorf("dpkg: %w\n%s", err, out)
	}
	return os.Rename(unpacked, root)
}

func openKernel(root string) (*kernel, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("%s holds %d kernels: %v", root, len(images), err)
	}
	k := &kernel{root: root, version: strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-"), modules: map[string]string{}}
	err = filepath.WalkDir(filepath.Join(root, "lib/modules", k.version), func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok && err == nil {
			k.modules[moduleName(name)] = path
		}
		return err
	})
	return k, err
}

func (k *kernel) image() string { return filepath.Join(k.root, "boot", "vmlinuz-"+k.version) }

func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }

// depends returns the modules that the module in path names in its .modinfo.
func depends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s has no .modinfo", path)
	}
	text, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(text), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}

// addModules puts modules, what they depend on, and modules.dep into a.
func (k *kernel) addModules(a *archive, names []string) error {
	done := map[string]bool{}
	var lines strings.Builder
	base := "lib/modules/" + k.version
	var closure func(name string) ([]string, error)
	closure = func(name string) ([]string, error) {
		path, ok := k.modules[moduleName(name)]
		if !ok {
			return nil, fmt.Errorf("kernel %s has no module %s", k.version, name)
		}
		needs, err := depends(path)
		if err != nil {
			return nil, err
		}
		var all []string
		for _, n := range needs {
			below, err := closure(n)
			if err != nil {
				return nil, err
			}
			all = append(append(all, filepath.Base(k.modules[moduleName(n)])), below...)
		}
		if !done[path] {
			done[path] = true
			fmt.Fprintf(&lines, "%s: %s\n", filepath.Base(path), strings.Join(all, " "))
			return all, a.file(base+"/"+filepath.Base(path), path)
		}
		return all, nil
	}
	for _, name := range names {
		if _, err := closure(name); err != nil {
			return err
		}
	}
	a.text(base+"/modules.dep", lines.String())
	return nil
}
